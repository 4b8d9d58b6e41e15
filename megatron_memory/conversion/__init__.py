"""Checkpoints from one format to another, tensor by tensor.

| module | what it does |
|---|---|
| `lazy` | tensors that are read when they are written, tables by blocks of rows |
| `saved_state` | a checkpoint of any format: our configuration, tensors by our names |
| `rules`, `attention`, `decoder` | which tensors of a format make which of ours, and back |
| `dcp_files`, `safetensors_files`, `folders` | the files, read without running pickled code |
| `megatron`, `lingua`, `hf` | the formats |
| `verify` | everything accounted for, bits and logits compared |
| `convert` | one conversion from its options to its report |
"""
