"""megatron-core's way to load, with nothing in it that unpickles or believes a file.

It reads `.metadata` by torch's pickle, `common.pt` and each tensor by `torch.load`. Here all three
are replaced by what was checked: the list and the plain values by the objects that were read, and
the part of a file that a tensor is in by one that was looked through.
"""

import copy
from pathlib import Path
from typing import IO, Any

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
from megatron_memory.upstream import fitting

checkpoints = fitting("checkpoints")


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
    return checkpoints.load(wanted, folder, _CheckedReader(folder, metadata), common)


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
