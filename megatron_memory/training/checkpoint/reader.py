"""megatron-core's way to load, with nothing in it that unpickles or believes a file.

It reads `.metadata` by torch's pickle, `common.pt` and each tensor by `torch.load`. Here all three
are replaced by what was checked: the list and the plain values by the objects that were read, and
the part of a file that a tensor is in by one that was looked through.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import FilePart, TensorInFile, check_torch_stream


def load_state(
    wanted: dict[str, Any], folder: Path, metadata: Metadata, common: dict[str, Any]
) -> dict[str, Any]:
    """Read this rank's part of what is wanted; a collective call.

    Args:
        wanted: megatron-core's sharded state dict.
        folder: the checkpoint.
        metadata: what `read_metadata` said of it.
        common: what `read_common` said of it.

    Raises:
        CheckpointError: a tensor's place holds something else.
        CheckpointException, CheckpointingException, OSError, RuntimeError: from the libraries.
    """
    return dist_checkpointing.load(wanted, str(folder), _LoadSharded(metadata), _LoadCommon(common))


class _LoadCommon(TorchCommonLoadStrategy):
    def __init__(self, common: dict[str, Any]):
        self._common = common

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """The values that were read already; the caller may change its copy."""
        return copy.deepcopy(self._common)


class _LoadSharded(TorchDistLoadShardedStrategy):
    def __init__(self, metadata: Metadata):
        super().__init__()
        self._metadata = metadata

    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> dict[str, Any]:
        """As megatron-core's own, through our reader."""
        reader = _CheckedReader(checkpoint_dir, self._metadata)
        with _reading_by(reader):
            return super().load(sharded_state_dict, checkpoint_dir)


@contextlib.contextmanager
def _reading_by(reader: FileSystemReader) -> Iterator[None]:
    """megatron-core 0.16 makes its reader in a function of its own, and asks for none."""
    original = torch_strategies._get_filesystem_reader
    torch_strategies._get_filesystem_reader = lambda *_, **__: reader
    try:
        yield
    finally:
        torch_strategies._get_filesystem_reader = original


class _CheckedReader(FileSystemReader):
    def __init__(self, folder: str | Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata
        self._stored = {
            (place.relative_path, place.offset): index
            for index, place in metadata.storage_data.items()
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list that was read already."""
        if args or kwargs.get("rank") is not None:
            raise CheckpointError(f"{self.path}: lists of single ranks are not read")
        metadata = copy.copy(self._metadata)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata

    def _slice_file(self, file: IO[bytes], sinfo: _StorageInfo) -> IO[bytes]:
        part = FilePart(file, sinfo.offset, sinfo.length)
        index = self._stored[sinfo.relative_path, sinfo.offset]
        try:
            found = check_torch_stream(part)
        except UnsafeFile as error:
            raise CheckpointError(
                f"{self.path}/{sinfo.relative_path}: {index.fqn} is damaged: {error}"
            ) from error
        self._check_tensor(index, found)
        return part  # type: ignore[return-value]

    def _check_tensor(self, index: MetadataIndex, found: Any) -> None:
        listed = self._metadata.state_dict_metadata[index.fqn]
        if not isinstance(listed, TensorStorageMetadata):
            return
        shapes = {chunk.offsets: chunk.sizes for chunk in listed.chunks}
        shape = listed.size if index.offset is None else shapes.get(index.offset)
        dtype = listed.properties.dtype
        if found != TensorInFile(dtype=dtype, shape=tuple(shape or ())):
            raise CheckpointError(
                f"{self.path}: the part of {index.fqn} at {list(index.offset or ())} is not the "
                f"{list(shape or ())} of {dtype} that its list says: it is damaged"
            )
