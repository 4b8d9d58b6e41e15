"""Is a checkpoint whole, and what is in it: answered from its metadata, before any tensor is read.

torch reads `.metadata` with pickle, which runs whatever a file says. It is therefore read here
first, by an unpickler that knows only the classes such a file needs.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_memory.exceptions import CheckpointError

METADATA_FILE = ".metadata"
_CORE_FILES = (METADATA_FILE, "metadata.json", "common.pt")

_ALLOWED_CLASSES = {
    "builtins": {"set", "getattr"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
_DTYPE = re.compile(r"(bfloat16|float8_\w+|u?int\d+|float\d+|bool|complex\d+)")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "builtins" and name == "getattr":
            return _enum_member
        if name in _ALLOWED_CLASSES.get(module, ()) or (
            module == "torch" and _DTYPE.fullmatch(name)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def _enum_member(owner: Any, name: str) -> Any:
    """What pickle writes for a member of an enumeration; getattr itself would open every door."""
    if getattr(owner, "__name__", "") not in ("_MEM_FORMAT_ENCODING", "WriteItemType"):
        raise pickle.UnpicklingError(f"it takes {name} of {owner!r}")
    return owner[name]


def read_metadata(folder: Path) -> Metadata:
    """The list of a checkpoint's tensors, and where each is stored.

    Raises:
        CheckpointError: it is missing, damaged, or refers to code.
    """
    path = folder / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was not completed") from None
    # A damaged pickle raises nearly anything: EOFError, ValueError, AttributeError, MemoryError.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error or type(error).__name__}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is damaged: it does not describe a checkpoint")
    return metadata


def check_whole(folder: Path) -> Metadata:
    """That a checkpoint has all of its files at their full length.

    Raises:
        CheckpointError: what is missing or truncated.
    """
    for name in _CORE_FILES:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing: the checkpoint was not completed, or is none"
            )
    _check_format(folder / "metadata.json")
    if not zipfile.is_zipfile(folder / "common.pt"):
        raise CheckpointError(f"{folder / 'common.pt'} is damaged or truncated")
    metadata = read_metadata(folder)
    check_stored(folder, metadata)
    return metadata


def check_stored(folder: Path, metadata: Metadata) -> None:
    """That a list of tensors makes sense, and that the files it names have all of them.

    Raises:
        CheckpointError: what is damaged, missing or truncated.
    """
    for name, end in stored_lengths(metadata, folder).items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size < end:
            raise CheckpointError(f"{file} is truncated: {size} bytes of at least {end}")


def stored_lengths(metadata: Metadata, folder: Path) -> dict[str, int]:
    """The bytes that each file must have at least, by its name.

    Raises:
        CheckpointError: the list is damaged, or names a file outside of the checkpoint.
    """
    lengths: dict[str, int] = {}
    try:
        for stored in metadata.storage_data.values():
            name, end = stored.relative_path, int(stored.offset + stored.length)
            if Path(name).name != name:
                raise ValueError(f"it names a file outside of the checkpoint, {name!r}")
            if not 0 <= stored.offset <= end:
                raise ValueError(f"a place in {name} from {stored.offset} to {end}")
            lengths[name] = max(lengths.get(name, 0), end)
        _check_tensors(metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / METADATA_FILE} is damaged: {error}") from error
    return lengths


def _check_tensors(metadata: Metadata) -> None:
    """Every attribute that a reader uses; a damaged pickle makes objects that lack some."""
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError(f"a tensor's name is {key!r}")
        if not isinstance(stored, TensorStorageMetadata):
            continue
        if not isinstance(stored.properties.dtype, torch.dtype):
            raise TypeError(f"{key} is of type {stored.properties.dtype!r}")
        _check_sizes(key, stored.size, stored.size)
        for chunk in stored.chunks:
            _check_sizes(key, chunk.sizes, stored.size)
            _check_sizes(key, chunk.offsets, stored.size)


def _check_sizes(key: str, sizes: Sequence[int], whole: Sequence[int]) -> None:
    if len(sizes) != len(whole) or not all(isinstance(size, int) for size in (*sizes, *whole)):
        raise TypeError(f"{key} is cut as {list(sizes)} of {list(whole)}")
    if not all(0 <= size <= most for size, most in zip(sizes, whole, strict=True)):
        raise ValueError(f"{key} is cut as {list(sizes)} of {list(whole)}")


def _check_format(path: Path) -> None:
    try:
        written = json.loads(path.read_text("utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if written != "torch_dist":
        raise CheckpointError(
            f"{path}: the checkpoint's format is {written}, and only torch_dist is read. Convert "
            "it with the program that wrote it"
        )


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by its key."""
    return {
        key: tuple(stored.size)
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
