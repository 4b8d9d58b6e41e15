"""Weight files of Hugging Face: `model.safetensors`, or shards and an index; `.bin` to read."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import read_json
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import load_torch_file

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PLACES = ((_ONE_FILE, _INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
"""Of the weights, one file or an index; the first that is there is read."""
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth"}
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_weight_files(folder: Path) -> Tensors:
    """All tensors of a model's folder.

    Raises:
        CheckpointError: a file is missing, damaged, or holds code.
    """
    for (one_file, index), read in zip(_PLACES, (read_safetensors, read_pickled), strict=True):
        if (folder / index).is_file():
            if (folder / one_file).is_file():
                raise CheckpointError(
                    f"{folder} holds {one_file} and {index}, and which of them is the model is not "
                    "known (transformers reads the first): remove the other one with its shards"
                )
            return _of_index(folder, folder / index, read)
        if (folder / one_file).is_file():
            return read(folder / one_file)
    raise CheckpointError(f"{folder} holds neither {_ONE_FILE} nor {_INDEX}: no model's weights")


def unread_weights(folder: Path) -> list[str]:
    """Names of the files that `read_weight_files` leaves out, and that hold weights by their names.

    Raises:
        CheckpointError: one is an adapter, without which the model is another one; or an index is
            damaged.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHT_SUFFIXES)
    adapters = [name for name in names if name.startswith("adapter_model")]
    if adapters:
        raise CheckpointError(
            f"{folder / adapters[0]} is an adapter (LoRA or such), which transformers adds to the "
            "model and which is not read here. Merge it into the weights (peft: "
            "merge_and_unload), or remove it"
        )
    read: set[str] = set()
    for one_file, index in _PLACES:
        if not read and (folder / index).is_file():
            read = set(read_weight_map(folder / index).values())
        elif not read and (folder / one_file).is_file():
            read = {one_file}
    return [name for name in names if name not in read]


def read_weight_map(index: Path) -> dict[str, str]:
    """Which file has each tensor, by what an index says.

    Raises:
        CheckpointError: it is damaged, or names a file outside of its folder.
    """
    placed = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{index} is damaged: it has no weight_map of names")
    for file in set(placed.values()):
        if Path(file).name != file:
            raise CheckpointError(f"{index} names a file outside of the folder, {file!r:.80}")
    return placed


def _of_index(folder: Path, index: Path, read: Callable[[Path], Tensors]) -> Tensors:
    names = read_weight_map(index)
    tensors: Tensors = {}
    for file in sorted(set(names.values())):
        # Unlike Path.is_file it does not raise on a name that is too long.
        if not os.path.isfile(folder / file):
            raise CheckpointError(f"{folder / file} is missing, which {index.name} names")
        found = read(folder / file)
        if displaced := sorted(n for n in found if names.get(n, file) != file):
            raise CheckpointError(
                f"{folder / file} holds {', '.join(displaced[:8])}, which {index.name} places in "
                f"{names[displaced[0]]}: remove what is stale, or copy the folder again"
            )
        tensors |= found
    if tensors.keys() != names.keys():
        differing = sorted(tensors.keys() ^ names.keys())
        raise CheckpointError(f"{index} and its files do not agree on {', '.join(differing[:8])}")
    return tensors


def read_safetensors(path: Path) -> Tensors:
    """The tensors of one file.

    Raises:
        CheckpointError: it is damaged, or of a type that is not known.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: _described(path, name, part) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error


def _described(path: Path, name: str, part: Any) -> LazyTensor:
    if part.get_dtype() not in _DTYPES:
        raise CheckpointError(f"{path}: {name} is of type {part.get_dtype()}, which is not read")
    return LazyTensor(
        shape=tuple(part.get_shape()),
        dtype=_DTYPES[part.get_dtype()],
        read_rows=partial(_read_rows, path, name),
    )


def _read_rows(path: Path, name: str, begin: int, end: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            return part[begin:end] if part.get_shape() else file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error


def read_pickled(path: Path) -> Tensors:
    """The tensors of one file as torch writes it.

    Raises:
        CheckpointError: it is damaged, or holds code.
    """
    try:
        loaded = load_torch_file(path, mmap=True)
    except (UnsafeFile, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read, or holds code: {error}") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in loaded.items()
    ):
        raise CheckpointError(f"{path}: holds something else than tensors by name")
    return {name: from_memory(tensor) for name, tensor in loaded.items()}


def write_weight_files(folder: Path, tensors: Tensors, max_shard_bytes: int) -> None:
    """Write shards of at most `max_shard_bytes`, but for larger tensors, and their index.

    A block at a time: safetensors' own writer would need a whole shard in memory, and a table of
    values is one tensor.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        _write_file(folder / _ONE_FILE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _shards(tensors: Tensors, max_bytes: int) -> Iterator[Tensors]:
    shard: Tensors = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.num_bytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.num_bytes
    yield shard


def _write_file(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.num_bytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format wants the data to begin at a multiple of 8; spaces may end the header.
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for begin, end in tensor.blocks():
                rows = tensor.read_rows(begin, end).contiguous()
                file.write(rows.flatten().view(torch.uint8).numpy().data)
