"""The model card of an exported memory model: README.md of its folder."""

import torch

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.conversion.saved_state import SavedState

_VARIANTS = {
    "pkm": "product-key memory (pkm)",
    "memory+": "Memory+",
    "peer": "PEER, rows of two tables as single-neuron experts",
}
_TEXT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- memory-layers
- product-key-memory
---

# A language model with memory layers

A decoder like Llama's, in which {which}
{place}. For each token such a layer reads {reads} of {slots:,} rows of a trained
table, found by product keys ("Memory Layers at Scale",
[arXiv 2412.09764](https://arxiv.org/abs/2412.09764)). Trained with megatron-memory.

| | |
|---|---|
{table}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

`trust_remote_code=True` runs the two Python files of this folder, which are the model's definition;
they need torch and transformers (4.51 to 5) only.{tokenizer}

## Licence

None is stated here: it depends on the data and the base that the model was made of. Whoever
publishes it should choose one and add `license:` to the header of this file.

## Reference

```bibtex
@article{{berges2024memory,
  title   = {{Memory Layers at Scale}},
  author  = {{Berges, Vincent-Pierre and O{{\\u{{g}}}}uz, Barlas and Haziza, Daniel and
             Yih, Wen-tau and Zettlemoyer, Luke and Ghosh, Gargi}},
  journal = {{arXiv preprint arXiv:2412.09764}},
  year    = {{2024}}
}}
```
"""
_WITHOUT_TOKENIZER = """

No tokenizer is in this folder: take the training's own, and give `generate` the numbers of its
tokens."""


def model_card(state: SavedState, dtype: torch.dtype, *, has_tokenizer: bool) -> str:
    """README.md of a folder with the model; what is not known is left out.

    Args:
        state: the model, with memory.
        dtype: of the weights that are written.
        has_tokenizer: whether the folder has a tokenizer.
    """
    config = state.config
    memory, layers = config.memory, memory_layers(config)
    numbers = ", ".join(map(str, layers))
    which = f"layer {numbers} (counted from 0) has"
    if len(layers) > 1:
        which = f"layers {numbers} (counted from 0) have"
    beside = "a memory beside the MLP" if memory.beside_mlp else "a memory in the MLP's place"
    rows = {**_shape(config), **_parameters(state, dtype), **_training(state)}
    return _TEXT.format(
        which=which,
        place=beside,
        reads=memory.num_heads * memory.top_k,
        slots=memory.num_values,
        table="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        tokenizer="" if has_tokenizer else _WITHOUT_TOKENIZER,
    )


def _shape(config: Config) -> dict[str, str]:
    model, memory = config.model, config.memory
    tables = len(memory_pools(config))
    shared = "one table for all of them" if tables == 1 else f"{tables} tables"
    return {
        "layers, hidden size": f"{model.num_layers}, {model.hidden_size}",
        "attention heads (key/value)": f"{model.num_attention_heads} ({model.num_query_groups})",
        "positions": f"{model.max_position_embeddings:,}",
        "memory": f"{_VARIANTS[memory.variant]}, {shared}",
        "rows x width of a table": f"{memory.num_values:,} x {memory.value_dim}",
        "read for a token": f"{memory.num_heads} heads x {memory.top_k} rows",
    }


def _parameters(state: SavedState, dtype: torch.dtype) -> dict[str, str]:
    sizes = {name: torch.Size(tensor.shape).numel() for name, tensor in state.weights.items()}
    in_tables = sum(size for name, size in sizes.items() if name.startswith("memory."))
    return {
        "parameters": f"{sum(sizes.values()):,}, of which {in_tables:,} in tables",
        "type of the weights": str(dtype).removeprefix("torch."),
        "vocabulary": f"{state.vocab_size:,} tokens",
    }


def _training(state: SavedState) -> dict[str, str]:
    """What is known of it: nothing where the checkpoint is not a training's."""
    if not state.iteration:
        return {}
    config, rows = state.config, {"optimizer steps": f"{state.iteration:,}"}
    if state.consumed_samples:
        length = config.model.seq_length
        tokens = state.consumed_samples * length
        rows["training data"] = f"{tokens:,} tokens, in sequences of {length:,}"
    rows["learning rate"] = f"{config.optimizer.lr:g}, of the values {config.memory.value_lr:g}"
    return rows
