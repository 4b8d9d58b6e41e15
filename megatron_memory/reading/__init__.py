"""Files that others wrote, read so that they can neither run code nor ask for more than they hold.

| module | what it reads |
|---|---|
| `pickles` | a pickle, by an interpreter of its opcodes that makes only what its caller lists |
| `plain_data` | how deep and how large what was read is |
| `torch_files` | what `torch.save` wrote: whether `torch.load` may be let at it |
| `documents` | JSON and YAML |
| `tokenizer_files` | tokenizers' ids; panics of their libraries |

Memory and time follow a file's size, whatever it says. Each reader raises `UnsafeFile`, whose text
says what is wrong; its caller knows the path, and what to do.
"""
