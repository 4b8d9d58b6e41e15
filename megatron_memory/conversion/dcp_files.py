"""Folders of torch.distributed.checkpoint: our checkpoints and the public reference's.

Read and written on one process, in blocks. The list of tensors is read by `read_metadata`, which
runs no code, and tensors with `weights_only`.
"""

import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import load_torch_part


class StoredTensors:
    """The tensors of a folder. A stored piece is kept while the rows asked for touch it.

    Args:
        folder: with `.metadata` and the files that it names.
        metadata: what `read_metadata` said of it, and `check_stored` found in order.
    """

    def __init__(self, folder: Path, metadata: Metadata):
        self._folder = folder
        self._metadata = metadata
        self._pieces: dict[MetadataIndex, Tensor] = {}

    def tensors(self) -> Tensors:
        """All tensors, by the names that they have there."""
        return {
            name: LazyTensor(
                shape=tuple(stored.size),
                dtype=stored.properties.dtype,
                read_rows=partial(self._read, name),
            )
            for name, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def objects(self) -> dict[str, MetadataIndex]:
        """Where each value that is no tensor lies."""
        return {
            index.fqn: index
            for index in self._metadata.storage_data
            if not isinstance(self._metadata.state_dict_metadata[index.fqn], TensorStorageMetadata)
        }

    def read_object(self, index: MetadataIndex) -> Any:
        """A plain value.

        Raises:
            CheckpointError: it is damaged, or holds code.
        """
        return self._load(index)

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        stored = self._metadata.state_dict_metadata[name]
        assert isinstance(stored, TensorStorageMetadata)
        if not stored.size:
            return self._load(self._index(name, stored.chunks[0]))
        wanted = torch.empty(end - begin, *stored.size[1:], dtype=stored.properties.dtype)
        filled, used = 0, {}
        for chunk in stored.chunks:
            first, last = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            top, bottom = max(begin, first), min(end, last)
            if top >= bottom:
                continue
            index = self._index(name, chunk)
            piece = used[index] = self._piece(index, chunk, stored.properties.dtype)
            place = wanted[top - begin : bottom - begin]
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place if dim == 0 else place.narrow(dim, offset, size)
            place.copy_(piece[top - first : bottom - first])
            filled += place.numel()
        self._pieces = used
        if filled != wanted.numel():
            raise CheckpointError(f"{self._folder}: {name} is not stored whole, it is damaged")
        return wanted

    def _index(self, name: str, chunk: ChunkStorageMetadata) -> MetadataIndex:
        index = MetadataIndex(name, chunk.offsets)
        # A tensor that was saved as a whole may have no offsets in its place in the list.
        for found in (index, MetadataIndex(name)):
            if found in self._metadata.storage_data:
                return found
        raise CheckpointError(f"{self._folder}: {name} has no place in its files, it is damaged")

    def _piece(
        self, index: MetadataIndex, chunk: ChunkStorageMetadata, dtype: torch.dtype
    ) -> Tensor:
        if index in self._pieces:
            return self._pieces[index]
        piece = self._load(index)
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes or piece.dtype != dtype:
            raise CheckpointError(
                f"{self._folder}: {index.fqn} is not what its list says, it is damaged"
            )
        return piece

    def _load(self, index: MetadataIndex) -> Any:
        info = self._metadata.storage_data[index]
        path = self._folder / info.relative_path
        try:
            return load_torch_part(path, info.offset, info.length)
        except (UnsafeFile, OSError) as error:
            raise CheckpointError(f"{path}: {index.fqn} cannot be read: {error}") from error


def write_dcp(folder: Path, tensors: Tensors, objects: dict[str, Any] | None = None) -> None:
    """Write a folder, a block at a time.

    Args:
        folder: empty.
        tensors: by the names that they are to have.
        objects: other values, by name.

    Raises:
        OSError, CheckpointError: it cannot be written, or a tensor cannot be read.
    """
    planner = _Planner(tensors, objects or {})
    writer = dcp.FileSystemWriter(folder, thread_count=1, overwrite=False)
    try:
        with warnings.catch_warnings():
            # That it saves on one process, as it is told to.
            warnings.filterwarnings("ignore", "torch.distributed is", UserWarning)
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    except dcp.CheckpointException as failed:
        raise _reason(failed) from failed


def _reason(failed: dcp.CheckpointException) -> BaseException:
    """torch wraps what went wrong on each rank; here there is one, and what it met first counts."""
    ((cause, _),) = failed.failures.values()
    first: BaseException | None = cause
    while first is not None and not isinstance(first, CheckpointError | OSError):
        first = first.__cause__ or first.__context__
    return first or CheckpointError(f"it cannot be written: {type(cause).__name__}: {cause}")


class _Planner(SavePlanner):
    """Plans from the shapes alone, and reads a block when the writer asks for it."""

    def __init__(self, tensors: Tensors, objects: dict[str, Any]):
        self._tensors = tensors
        self._objects = objects

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        items = [item for name, tensor in self._tensors.items() for item in _items(name, tensor)]
        items += [
            WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO)
            for name in self._objects
        ]
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        name = write_item.index.fqn
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save(self._objects[name], stream)
            return stream
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        begin = chunk.offsets[0] if chunk.offsets else 0
        rows = chunk.sizes[0] if chunk.sizes else 1
        return self._tensors[name].read_rows(begin, begin + rows).contiguous()


def _items(name: str, tensor: LazyTensor) -> list[WriteItem]:
    items = []
    for begin, end in tensor.blocks():
        rest = tensor.shape[1:]
        offsets = torch.Size((begin, *(0 for _ in rest)) if tensor.shape else ())
        sizes = torch.Size((end - begin, *rest) if tensor.shape else ())
        items.append(
            WriteItem(
                index=MetadataIndex(name, offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                    properties=TensorProperties(dtype=tensor.dtype),
                    size=torch.Size(tensor.shape),
                ),
            )
        )
    return items
