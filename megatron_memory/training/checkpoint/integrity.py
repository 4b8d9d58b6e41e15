"""Is a checkpoint whole, and what is in it: answered before any tensor is read."""

import os
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import open_regular, read_json
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import check_torch_stream
from megatron_memory.training.checkpoint.common_state import COMMON_FILE, has_common
from megatron_memory.training.checkpoint.coverage import check_coverage
from megatron_memory.training.checkpoint.metadata_file import METADATA_FILE, read_metadata

_CORE_FILES = (METADATA_FILE, "metadata.json")


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
    metadata = read_metadata(folder)
    common = folder / COMMON_FILE
    if not has_common(folder, metadata):
        raise CheckpointError(f"{common} is missing: the checkpoint was not completed, or is none")
    if common.is_file():
        _check_common(common)
    check_stored(folder, metadata)
    return metadata


def check_stored(folder: Path, metadata: Metadata) -> None:
    """That a list of tensors makes sense, and that the files it names have all of them.

    Raises:
        CheckpointError: what is damaged, missing or truncated.
    """
    for name, end in stored_lengths(metadata, folder).items():
        file = folder / name
        # Unlike Path.is_file it does not raise on a name that is too long.
        if not os.path.isfile(file):
            raise CheckpointError(f"{file} is missing")
        size = file.stat().st_size
        if size < end:
            raise CheckpointError(f"{file} is truncated: {size} bytes of at least {end}")


def stored_lengths(metadata: Metadata, folder: Path) -> dict[str, int]:
    """The bytes that each file must have at least, by its name.

    Raises:
        CheckpointError: the list is damaged, or names a file outside of the checkpoint.
    """
    try:
        check_coverage(metadata)
    except ValueError as error:
        raise CheckpointError(f"{folder / METADATA_FILE} is damaged: {error}") from error
    lengths: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        name, end = stored.relative_path, stored.offset + stored.length
        lengths[name] = max(lengths.get(name, 0), end)
    return lengths


def _check_format(path: Path) -> None:
    written = read_json(path, CheckpointError)
    expected = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    expected |= {"common_backend": "torch", "common_backend_version": 1}
    if "sharded_backend" not in written:
        raise CheckpointError(f"{path} is damaged: it does not name the checkpoint's format")
    for name, value in expected.items():
        if written.get(name, value) != value:
            raise CheckpointError(
                f"{path}: {name} of the checkpoint is {written[name]!r:.80}, and only {value!r} is "
                "read. Convert it with the program that wrote it"
            )


def _check_common(path: Path) -> None:
    try:
        with open_regular(path) as stream:
            check_torch_stream(stream, verify=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnsafeFile as error:
        raise CheckpointError(f"{path} is damaged or truncated: {error}") from error


def tensor_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by its key."""
    return {
        key: tuple(stored.size)
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
