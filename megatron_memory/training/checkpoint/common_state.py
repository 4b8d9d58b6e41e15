"""Where a checkpoint keeps its plain values, by the version of megatron-core that wrote it."""

import os
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import load_torch_file, load_torch_part
from megatron_memory.training.checkpoint.metadata_file import read_metadata

COMMON_FILE = "common.pt"
"""A file of their own, before megatron-core 0.19."""
COMMON_OBJECT = "common_state/shard_0_1"
"""Since then, an object among the tensors."""


def has_common(folder: Path, metadata: Metadata) -> bool:
    """Whether a checkpoint has plain values in either place."""
    return os.path.isfile(folder / COMMON_FILE) or COMMON_OBJECT in metadata.state_dict_metadata


def read_values(folder: Path, metadata: Metadata | None = None) -> tuple[Any, Path]:
    """A checkpoint's plain values, not looked at, and the file that has them.

    Args:
        folder: of the checkpoint.
        metadata: its list of tensors, where that was read already.

    Raises:
        CheckpointError: there are none, they are damaged, or hold code.
    """
    path = folder / COMMON_FILE
    try:
        if os.path.lexists(path):
            return load_torch_file(path), path
        stored = (metadata or read_metadata(folder)).storage_data
        places = [place for index, place in stored.items() if index.fqn == COMMON_OBJECT]
        if not places:
            raise CheckpointError(
                f"{path} is missing: the checkpoint was not completed, or is none"
            )
        path, end = folder / places[0].relative_path, places[0].offset + places[0].length
        size = path.stat().st_size
        if size < end:
            raise CheckpointError(f"{path} is truncated: {size} bytes of at least {end}")
        (values,) = load_torch_part(path, places[0].offset, places[0].length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (UnsafeFile, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return values, path
