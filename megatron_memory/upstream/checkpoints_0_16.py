"""Checkpoints by megatron-core 0.16: plain values are in `common.pt`."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import (
    COMMON_STATE_FNAME,
    TorchCommonLoadStrategy,
    TorchCommonSaveStrategy,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint import FileSystemReader

from megatron_memory.upstream.replacing import replaced

SaveStrategy = torch_strategies.TorchDistSaveShardedStrategy

PRIVATE_NAMES = {
    "megatron.core.dist_checkpointing.serialization": ("Path",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async": (
        "FileSystemWriterAsync.write_preloaded_data_multiproc",
    ),
    "megatron.core.dist_checkpointing.strategies.common": (
        "TorchCommonLoadStrategy.load_common",
        "TorchCommonSaveStrategy.save_common",
    ),
}
"""As `private_names.NAMES`."""
WRITERS = "write_preloaded_data_multiproc"
"""Method of the writer that starts a worker for each file."""


def written_by_first_rank() -> list[tuple[Any, str]]:
    """Owners and names of the functions by which rank 0 alone writes."""
    return [
        (FileSystemWriterAsync, "finish"),
        (TorchCommonSaveStrategy, "save_common"),
        (serialization, "save_config"),
    ]


def install() -> None:
    """Fit what differs between the lines."""
    TorchCommonSaveStrategy.save_common = _save_common


def list_by(path_class: type[Path]) -> None:
    """Have rank 0 list the folder by this class before it writes."""
    serialization.Path = path_class


def _save_common(
    self: TorchCommonSaveStrategy, common_state_dict: dict[str, Any], checkpoint_dir: str | Path
) -> None:
    """As megatron-core's, through a file of Python's: torch's own tells no cause of an error."""
    if dist.get_rank() == 0:
        with open(Path(checkpoint_dir) / COMMON_STATE_FNAME, "wb") as file:
            torch.save(common_state_dict, file)


def save(
    state: dict[str, Any],
    folder: Path,
    strategy: Any,
    content_metadata: dict[str, Any],
    compared: Callable[[dict[str, Any]], dict[str, Any]],
) -> AsyncRequest:
    """Plan a checkpoint and write its plain values. The tensors are the request's.

    `compared`: what of the plain values must be alike on all ranks.
    """
    return dist_checkpointing.save(
        state,
        str(folder),
        strategy,
        async_sharded_save=True,
        content_metadata=content_metadata,
        preprocess_common_before_consistancy_check=compared,
    )


def load(
    wanted: dict[str, Any], folder: Path, reader: FileSystemReader, common: dict[str, Any]
) -> dict[str, Any]:
    """Read this rank's part of what is wanted, with `reader`; plain values are `common`'s."""
    make_reader: Callable[..., FileSystemReader] = lambda *_, **__: reader  # noqa: E731
    # megatron-core makes its reader in a function of its own, and asks for none.
    with replaced(torch_strategies, "_get_filesystem_reader", make_reader):
        sharded = torch_strategies.TorchDistLoadShardedStrategy()
        return dist_checkpointing.load(wanted, str(folder), sharded, _LoadCommon(common))


class _LoadCommon(TorchCommonLoadStrategy):
    def __init__(self, common: dict[str, Any]):
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """The values that were read already; the caller may change its copy."""
        return copy.deepcopy(self._common)
