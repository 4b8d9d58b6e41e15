"""Checkpoints by megatron-core 0.19: plain values are an object among the tensors."""

import copy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import FileSystemReader

from megatron_memory.upstream.replacing import replaced

SaveStrategy = torch_strategies.TorchDistSaveShardedStrategy

PRIVATE_NAMES = {
    "megatron.core.dist_checkpointing.serialization": ("load_common_state_dict", "maybe_msc"),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        "FileSystemWriterAsync.write_preloaded_data_multithread",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("_logged_mcore_async_deprecation",),
}
"""As `private_names.NAMES`."""
WRITERS = "write_preloaded_data_multithread"
"""Method of the writer that starts a worker for each file."""


def written_by_first_rank() -> list[tuple[Any, str]]:
    """Owners and names of the functions by which rank 0 alone writes."""
    return [(FileSystemWriterAsync, "finish"), (serialization, "save_config")]


def install() -> None:
    """Fit what differs between the lines."""
    # It says at each run that its writer is older than nvidia-resiliency-ext's.
    torch_strategies._logged_mcore_async_deprecation = True


def list_by(path_class: type[Path]) -> None:
    """Have rank 0 list the folder by this class before it writes."""
    # In place of its layer for multi-storage-client, which is not used here.
    serialization.maybe_msc = types.SimpleNamespace(Path=path_class)


def save(
    state: dict[str, Any],
    folder: Path,
    strategy: Any,
    content_metadata: dict[str, Any],
    compared: Callable[[dict[str, Any]], dict[str, Any]],
) -> AsyncRequest:
    """Plan a checkpoint. Its tensors and plain values are the request's to write.

    `compared`: what of the plain values must be alike on all ranks.
    """
    return dist_checkpointing.save(
        state,
        str(folder),
        strategy,
        async_sharded_save=True,
        content_metadata=content_metadata,
        preprocess_common_before_consistancy_check=compared,
        async_strategy="mcore",
    )


def load(
    wanted: dict[str, Any], folder: Path, reader: FileSystemReader, common: dict[str, Any]
) -> dict[str, Any]:
    """Read this rank's part of what is wanted, with `reader`; plain values are `common`'s."""
    # megatron-core makes its reader, and reads plain values, in functions of its own.
    with (
        replaced(torch_strategies, "_get_filesystem_reader", lambda *_, **__: reader),
        replaced(serialization, "load_common_state_dict", lambda *_: copy.deepcopy(common)),
    ):
        sharded = torch_strategies.TorchDistLoadShardedStrategy()
        return dist_checkpointing.load(wanted, str(folder), sharded)
