"""`.metadata`, the list of a checkpoint's tensors: read once, by us, and never by pickle.

torch unpickles it, which runs whatever a file says. Here it is read by `reading.pickles`, and every
name in it stands for a `Maker` of this module, which checks each value that it takes. What the
loaders get is that object: `reader.py` hands it to torch's.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import open_regular
from megatron_memory.reading.pickles import Maker, UnsafeFile, read_pickle, shown
from megatron_memory.reading.torch_files import dtype_called

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint"
_MOST_DIMENSIONS = 64
_MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.preserve_format)
_MEMORY_FORMAT_NAMES = (
    "TORCH_CONTIGUOUS_FORMAT",
    "TORCH_CHANNELS_LAST",
    "TORCH_PRESERVE_FORMAT",
)
# How a checkpoint was planned: nobody who loads it asks.
_PLANS = ("SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData", "WriteItemType")


def read_metadata(folder: Path) -> Metadata:
    """The list of a checkpoint's tensors, and where each is stored.

    Raises:
        CheckpointError: it is missing, damaged, or refers to code.
    """
    path = folder / METADATA_FILE
    try:
        with open_regular(path) as stream:
            metadata = read_pickle(stream.read(), _find, key_types=(MetadataIndex,))
        if type(metadata) is not Metadata:
            raise UnsafeFile("it does not describe a checkpoint")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint was not completed") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except UnsafeFile as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return metadata


class _Unread:
    """Of what is not used."""


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_size(value: Any) -> bool:
    return type(value) is torch.Size


def _is_dict_of(key: type, *values: type) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        return type(value) is dict and all(
            type(k) is key and type(v) in values for k, v in value.items()
        )

    return holds


def _is_none_or(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_list_of_chunks(value: Any) -> bool:
    return type(value) is list and all(type(chunk) is ChunkStorageMetadata for chunk in value)


def _is_empty(value: Any) -> bool:
    return value is None or (type(value) in (list, tuple) and not value)


def _is_unread(value: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields:
    """What the fields of a class of torch's must be; those of `optional` may be missing."""

    of: type
    required: dict[str, Callable[[Any], bool]]
    optional: dict[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Of the optional ones, those that are left out of the object."""

    def new(self) -> Any:
        return object.__new__(self.of)

    def fill(self, made: Any, state: Any) -> None:
        if type(state) is not dict or not self.required.keys() <= state.keys():
            raise UnsafeFile(f"a {self.of.__name__} lacks some of {', '.join(self.required)}")
        for name, value in state.items():
            holds = self.required.get(name) or self.optional.get(name)
            if holds is None:
                raise UnsafeFile(f"a {self.of.__name__} has {shown(name)}, which is not known")
            if not holds(value):
                raise UnsafeFile(f"{name} of a {self.of.__name__} is a {type(value).__name__}")
            if name not in self.unread:
                made.__dict__[name] = value


_CLASSES = (
    _Fields(
        of=Metadata,
        required={
            "state_dict_metadata": _is_dict_of(str, TensorStorageMetadata, BytesStorageMetadata),
            "storage_data": _is_dict_of(MetadataIndex, _StorageInfo),
        },
        optional={
            "storage_meta": _is_none_or(lambda value: type(value) is StorageMeta),
            "version": _is_none_or(_is_text),
            "planner_data": _is_unread,
            "mcore_data": _is_unread,
            "all_local_plans": _is_unread,
        },
        unread=("planner_data", "mcore_data", "all_local_plans"),
    ),
    _Fields(
        of=TensorStorageMetadata,
        required={
            "properties": lambda value: type(value) is TensorProperties,
            "size": _is_size,
            "chunks": _is_list_of_chunks,
        },
    ),
    _Fields(of=ChunkStorageMetadata, required={"offsets": _is_size, "sizes": _is_size}),
    _Fields(
        of=MetadataIndex,
        required={"fqn": _is_text},
        optional={"offset": _is_none_or(_is_size), "index": _is_none_or(_is_count)},
    ),
    _Fields(
        of=_StorageInfo,
        required={"relative_path": _is_text, "offset": _is_count, "length": _is_count},
        # What a writer did to the bytes, such as compressing them: neither torch's default writer
        # nor megatron-core's does anything.
        optional={"transform_descriptors": _is_empty},
    ),
)


def _fill_properties(made: TensorProperties, state: Any) -> None:
    dtype, layout, requires_grad, memory_format, pin_memory = state
    if not isinstance(dtype, torch.dtype) or layout is not torch.strided:
        raise UnsafeFile(f"a tensor is of type {shown(dtype)}, layout {shown(layout)}")
    if type(requires_grad) is not bool or type(pin_memory) is not bool:
        raise UnsafeFile("a tensor's properties are damaged")
    if not isinstance(memory_format, torch.memory_format):
        raise UnsafeFile(f"a tensor's memory format is {shown(memory_format)}")
    made.__dict__.update(
        dtype=dtype,
        layout=layout,
        requires_grad=requires_grad,
        memory_format=memory_format,
        pin_memory=pin_memory,
    )


def _size(arguments: tuple[Any, ...]) -> torch.Size:
    (sizes,) = arguments
    if type(sizes) is not tuple or len(sizes) > _MOST_DIMENSIONS or not all(map(_is_count, sizes)):
        raise UnsafeFile(f"a shape is {shown(sizes)}")
    return torch.Size(sizes)


def _layout(arguments: tuple[Any, ...]) -> torch.layout:
    if arguments != ("torch.strided",):
        raise UnsafeFile(f"a tensor's layout is {shown(arguments)}")
    return torch.strided


def _memory_format(arguments: tuple[Any, ...]) -> torch.memory_format:
    (number,) = arguments
    if not _is_count(number):
        raise UnsafeFile(f"a memory format is {shown(number)}")
    return _MEMORY_FORMATS[number]


def _member(arguments: tuple[Any, ...]) -> Any:
    """What some versions of Python write for a member of an enumeration: a call of getattr."""
    owner, name = arguments
    if owner is _PLAN_KIND:
        return _Unread()
    if owner is not _MEMORY_FORMAT or name not in _MEMORY_FORMAT_NAMES:
        raise UnsafeFile(f"it takes {shown(name)} of something")
    return _MEMORY_FORMATS[_MEMORY_FORMAT_NAMES.index(name)]


def _path(arguments: tuple[Any, ...]) -> PurePosixPath:
    if not all(map(_is_text, arguments)):
        raise UnsafeFile("a path that is no text")
    return PurePosixPath(*arguments)


def _empty_dict(arguments: tuple[Any, ...]) -> dict:
    if arguments:
        raise UnsafeFile("a dict that is made of something")
    return {}


def _unread(name: str) -> Maker:
    return Maker(
        name=name, call=lambda arguments: _Unread(), new=_Unread, fill=lambda made, state: None
    )


_MEMORY_FORMAT = Maker(name=f"{_DCP}.metadata._MEM_FORMAT_ENCODING", call=_memory_format)
_PLAN_KIND = Maker(name=f"{_DCP}.planner.WriteItemType", call=lambda arguments: _Unread())


def _makers() -> Iterator[Maker]:
    for fields in _CLASSES:
        name = f"{fields.of.__module__}.{fields.of.__qualname__}"
        yield Maker(name=name, new=fields.new, fill=fields.fill)
    yield Maker(
        name=f"{_DCP}.metadata.TensorProperties",
        new=lambda: object.__new__(TensorProperties),
        fill=_fill_properties,
    )
    yield Maker(name=f"{_DCP}.metadata.BytesStorageMetadata", new=BytesStorageMetadata)
    # When and where it was saved: torch fills in a new one.
    yield Maker(name=f"{_DCP}.metadata.StorageMeta", new=StorageMeta, fill=lambda made, state: None)
    yield _MEMORY_FORMAT
    yield Maker(name="torch.Size", call=_size)
    yield Maker(name="torch.serialization._get_layout", call=_layout)
    yield Maker(name="collections.OrderedDict", call=_empty_dict)
    yield Maker(name="builtins.getattr", call=_member)
    for module in ("pathlib", "pathlib._local"):
        for name in ("Path", "PosixPath", "PurePosixPath"):
            yield Maker(name=f"{module}.{name}", call=_path)
    yield from (_unread(f"{_DCP}.planner.{name}") for name in _PLANS if name != "WriteItemType")
    yield _unread(f"{_DCP}.filesystem._StoragePrefix")
    yield _PLAN_KIND


_KNOWN = {maker.name: maker for maker in _makers()}


def _find(module: str, name: str) -> Any:
    called = f"{module}.{name}"
    found = _KNOWN.get(called) or dtype_called(module, name)
    if found is None:
        raise UnsafeFile(f"it refers to {called:.200}, which no checkpoint needs")
    return found
