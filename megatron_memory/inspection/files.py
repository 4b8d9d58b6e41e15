"""Tensors by the names of a checkpoint's files, also where some are missing or damaged."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_memory.conversion.dcp_files import StoredTensors
from megatron_memory.conversion.lingua import CONSOLIDATED, locate_lingua, stored_tensors
from megatron_memory.conversion.options import Format
from megatron_memory.conversion.safetensors_files import (
    read_pickled,
    read_safetensors,
    read_weight_map,
)
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.finding import locate
from megatron_memory.training.checkpoint.integrity import stored_lengths
from megatron_memory.training.checkpoint.metadata_file import METADATA_FILE, read_metadata


def folder_of(load: Path, format_name: Format) -> Path:
    """The folder with the files of the checkpoint that `load` means: the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    if format_name == "lingua" and not (load / CONSOLIDATED).is_file():
        return locate_lingua(load)
    # A checkpoint's folder may have been renamed.
    if format_name == "megatron" and not (load / METADATA_FILE).is_file():
        folder = locate(load)
        if folder is None:
            raise CheckpointError(f"--load {load}: holds no checkpoint. Check the path")
        return folder
    return load


def read_files(folder: Path, format_name: Format) -> tuple[Tensors, list[str]]:
    """What is there.

    Returns:
        tensors by the names that they have there, and what is wrong with the files. Reading a
        tensor may still find that it is damaged.

    Raises:
        CheckpointError: the list of tensors cannot be read, or there is no tensor.
    """
    return _READ[format_name](folder)


def _read_dcp(folder: Path) -> tuple[Tensors, list[str]]:
    metadata = read_metadata(folder)
    problems = []
    for name, length in sorted(stored_lengths(metadata, folder).items()):
        file = folder / name
        if not file.is_file():
            problems.append(f"{file} is missing")
        elif file.stat().st_size < length:
            size = file.stat().st_size
            problems.append(f"{file} is truncated: {size} bytes of at least {length}")
    return StoredTensors(folder, metadata).tensors(), problems


def _read_lingua(folder: Path) -> tuple[Tensors, list[str]]:
    if (folder / CONSOLIDATED).is_file():
        return stored_tensors(folder), []
    return _read_dcp(folder)


def _read_hf(folder: Path) -> tuple[Tensors, list[str]]:
    tensors: Tensors = {}
    problems = []
    files = dict.fromkeys(sorted(folder.glob("*.safetensors")), read_safetensors)
    pickled = dict.fromkeys(sorted(folder.glob("pytorch_model*.bin")), read_pickled)
    for path, read in (files or pickled).items():
        try:
            tensors |= read(path)
        except CheckpointError as error:
            problems.append(str(error))
    for index in sorted(folder.glob("*.index.json")):
        problems += _unlike_index(index, tensors)
    if not tensors:
        raise CheckpointError("; ".join(problems) or f"{folder} holds no weights")
    return tensors, problems


def _unlike_index(index: Path, tensors: Tensors) -> Iterator[str]:
    try:
        placed = read_weight_map(index)
    except CheckpointError as error:
        yield str(error)
        return
    lost = {file for file in placed.values() if not os.path.isfile(index.parent / file)}
    for file in sorted(lost):
        yield f"{index.parent / file} is missing, which {index.name} names"
    unlike = sorted(tensors.keys() ^ placed.keys())
    unlike = [name for name in unlike if placed.get(name) not in lost]
    if unlike:
        more = f" and {len(unlike) - 8} more" if len(unlike) > 8 else ""
        yield f"{index} and its files do not agree on {', '.join(unlike[:8])}{more}"


_READ: dict[Format, Callable[[Path], tuple[Tensors, list[str]]]] = {
    "megatron": _read_dcp,
    "lingua": _read_lingua,
    "hf": _read_hf,
}
