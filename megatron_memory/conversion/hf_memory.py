"""Memory models in Hugging Face's format: the names and the configuration of `hf_model`.

What a memory layer adds to a Llama-like decoder; `hf` has the rest. Tables are one tensor here and
several parameters there, cut by rows.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megatron_memory.hf_model
from megatron_memory.config import Config, MemoryConfig, ModelConfig
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.conversion.decoder import (
    MEMORY_TABLES,
    memory_linear_layers,
    memory_prefix,
)
from megatron_memory.conversion.hf_families import Family
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.rules import Rule, same
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError

MODEL_TYPE = "memory_llama"
_CODE = Path(megatron_memory.hf_model.__file__).parent
CODE_FILES = ("configuration_memory_llama.py", "modeling_memory_llama.py")

_CLASSES = {
    "AutoConfig": "configuration_memory_llama.MemoryLlamaConfig",
    "AutoModel": "modeling_memory_llama.MemoryLlamaModel",
    "AutoModelForCausalLM": "modeling_memory_llama.MemoryLlamaForCausalLM",
}
_LINEAR = {
    "router.query": "router.query",
    "linear_fc1": "value_gate",
    "linear_fc2": "value_proj",
    "gate": "output_gate",
}
_ROOT = "model.memory_tables."
_CHUNK = re.compile(rf"({re.escape(_ROOT)}.+)\.chunks\.(\d+)\.weight")
# Each is memory_<name> there.
_SETTINGS = (
    "variant",
    "beside_mlp",
    "num_heads",
    "top_k",
    "num_half_keys",
    "key_dim",
    "value_dim",
    "gated",
    "qk_norm",
    "softmax_sink",
    "share_scope",
    "num_random_values",
    "query_dropout",
    "value_dropout",
)
MEMORY_SETTINGS = frozenset(
    f"memory_{name}" for name in (*_SETTINGS, "layers", "share_groups", "max_chunk_elements")
)
"""All that config.json says of the memory."""
_MAX_CHUNK_ELEMENTS = 2**30


def memory_rules(config: Config, layer: int) -> Iterator[Rule]:
    """The rules of a memory layer without its norm, and of the tables that it is the first to
    read."""
    memory = config.memory
    ours = memory_prefix(config, layer)
    theirs = f"model.layers.{layer}.mlp." + ("memory." if memory.beside_mlp else "")
    norms = ("query_norm", "key_norm") if memory.qk_norm else ()
    for name in ("keys", *norms, *(("sink",) if memory.softmax_sink else ())):
        yield same(f"{ours}router.{name}", f"{theirs}router.{name}")
    for our_name, their_name in _LINEAR.items():
        if our_name in memory_linear_layers(config):
            for kind in ("weight", "bias"):
                yield same(f"{ours}{our_name}.{kind}", f"{theirs}{their_name}.{kind}")
    for pool in memory_pools(config):
        if pool.layers[0] == layer:
            for table in MEMORY_TABLES[memory.variant]:
                name = f"{pool.name}.{table}.weight"
                yield same(f"memory.{name}", f"{_ROOT}{name}")


def cut_tables(tensors: Tensors, max_shard_bytes: int) -> Tensors:
    """Each table as the parameters that `hf_model` has, none larger than a file may be."""
    cut: Tensors = {}
    for name, tensor in tensors.items():
        if not name.startswith(_ROOT):
            cut[name] = tensor
            continue
        first = 0
        for number, rows in enumerate(_chunk_rows(tensor, max_shard_bytes)):
            part = name.removesuffix("weight") + f"chunks.{number}.weight"
            cut[part] = _rows_of(tensor, first, first + rows)
            first += rows
    return cut


def _chunk_rows(tensor: LazyTensor, max_shard_bytes: int) -> list[int]:
    from megatron_memory.hf_model.configuration_memory_llama import chunk_rows

    limit = max_chunk_elements(max_shard_bytes, tensor.dtype)
    return chunk_rows(tensor.num_rows, tensor.shape[1], limit)


def max_chunk_elements(max_shard_bytes: int, dtype: torch.dtype) -> int:
    """Elements of a table's parameter: few enough for a file, and for a GPU's 32-bit offsets."""
    return min(_MAX_CHUNK_ELEMENTS, max_shard_bytes // dtype.itemsize)


def join_tables(tensors: Tensors, config: Config, where: Path) -> Tensors:
    """The reverse of `cut_tables`.

    Raises:
        CheckpointError: parts of a table are missing, or do not have the configuration's shape.
    """
    joined = {name: tensor for name, tensor in tensors.items() if not _CHUNK.fullmatch(name)}
    parts: dict[str, dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if match := _CHUNK.fullmatch(name):
            parts.setdefault(match[1], {})[int(match[2])] = tensor
    width, num_rows = config.memory.value_dim, config.memory.num_values
    for name, chunks in parts.items():
        table = [chunks[number] for number in sorted(chunks)]
        rows = sum(chunk.num_rows for chunk in table)
        fits = all(chunk.shape[1:] == (width,) for chunk in table)
        if not fits or rows != num_rows:
            raise CheckpointError(
                f"{where}: {name} has parts {sorted(chunks)} of {rows} rows together, and its "
                f"configuration says {num_rows} rows of {width}. It is damaged, or files of "
                "another model are among its own"
            )
        joined[f"{name}.weight"] = _concatenated(table)
    return joined


def _rows_of(tensor: LazyTensor, first: int, end: int) -> LazyTensor:
    def read_rows(begin: int, stop: int) -> Tensor:
        return tensor.read_rows(first + begin, first + stop)

    return LazyTensor(
        shape=(end - first, *tensor.shape[1:]), dtype=tensor.dtype, read_rows=read_rows
    )


def _concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
    if len(parts) == 1:
        return parts[0]
    shape = (sum(part.num_rows for part in parts), *parts[0].shape[1:])
    return LazyTensor(
        shape=shape, dtype=parts[0].dtype, read_rows=partial(_read_concatenated, parts)
    )


def _read_concatenated(parts: Sequence[LazyTensor], begin: int, end: int) -> Tensor:
    rows, first = [], 0
    for part in parts:
        start, stop = max(begin - first, 0), min(end - first, part.num_rows)
        if start < stop:
            rows.append(part.read_rows(start, stop))
        first += part.num_rows
    return torch.cat(rows)


def memory_family(qk_norm: bool) -> Family:
    """Llama's family with what the memory models' class has beyond it."""
    return Family(
        model_type=MODEL_TYPE,
        architecture="MemoryLlamaForCausalLM",
        biases=_biases,
        qk_norm=qk_norm,
        own_values=_own_values,
    )


def _biases(values: Mapping[str, Any]) -> str:
    attention, mlp = bool(values.get("attention_bias")), bool(values.get("mlp_bias"))
    if attention != mlp:
        raise CheckpointError(
            f"attention_bias {attention} and mlp_bias {mlp}: biases are in all linear layers here, "
            "or in none"
        )
    return "all" if attention else "qkv" if values.get("qkv_bias") else "none"


def _own_values(model: ModelConfig) -> dict[str, Any]:
    has_bias = not model.disable_bias_linear
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"--to hf: --hidden-size {model.hidden_size} is no multiple of --num-attention-heads "
            f"{model.num_attention_heads}, which transformers' Llama insists on, whatever "
            "--kv-channels is. It cannot be converted"
        )
    return {
        "auto_map": _CLASSES,
        "head_dim": model.kv_channels,
        "attention_bias": has_bias,
        "mlp_bias": has_bias,
        "qkv_bias": model.add_qkv_bias and not has_bias,
        "qk_norm": model.qk_layernorm,
    }


def memory_values(config: Config) -> dict[str, Any]:
    """What the memory adds to config.json, but for how tables are cut."""
    memory = config.memory
    groups = [list(pool.layers) for pool in memory_pools(config)]
    return {f"memory_{name}": getattr(memory, name) for name in _SETTINGS} | {
        "memory_layers": list(memory_layers(config)),
        "memory_share_groups": groups if memory.share_scope == "stage" else None,
    }


def memory_of(values: Mapping[str, Any]) -> MemoryConfig:
    """The memory that a config.json describes.

    Raises:
        KeyError, TypeError, ValueError: a setting is missing, or of another kind.
        CheckpointError: nothing says which layers share a table.
    """
    groups = values["memory_share_groups"]
    if values["memory_share_scope"] == "stage" and not groups:
        raise CheckpointError("memory_share_scope 'stage': memory_share_groups says which layers")
    named = {name: f"memory_{name}" for name in _SETTINGS}
    settings: dict[str, Any] = {o: values[t] for o, t in named.items() if t in values}
    return MemoryConfig(
        layers=",".join(str(int(layer)) for layer in values["memory_layers"]) or None,
        share_groups=groups and ";".join(",".join(map(str, map(int, g))) for g in groups),
        **settings,
    )


def copy_code(folder: Path) -> None:
    """The files by which transformers knows the model."""
    for name in CODE_FILES:
        shutil.copyfile(_CODE / name, folder / name)


def check_code(folder: Path, config: Config) -> None:
    """That a folder's code is what `copy_code` wrote; verification runs this package's own.

    Raises:
        CheckpointError: names the file that is missing or differs.
    """
    for name in CODE_FILES if config.memory.enabled else ():
        path = folder / name
        if not path.is_file() or path.read_bytes() != (_CODE / name).read_bytes():
            raise CheckpointError(f"--verify: {path} is missing, or not the model's code")


def register() -> None:
    """Let transformers read memory models with this package's classes: code that a folder holds is
    never run here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megatron_memory.hf_model.configuration_memory_llama import MemoryLlamaConfig
    from megatron_memory.hf_model.modeling_memory_llama import MemoryLlamaForCausalLM

    AutoConfig.register(MODEL_TYPE, MemoryLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(MemoryLlamaConfig, MemoryLlamaForCausalLM, exist_ok=True)
