"""What `torch.save` wrote, looked through before `torch.load` opens it.

torch's own reader with `weights_only` runs no code, but it unpacks compressed members, and makes
tensors and arrays as large as the file tells it to.
"""

import dataclasses
import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from megatron_memory.reading.documents import open_regular
from megatron_memory.reading.pickles import Maker, UnsafeFile, read_pickle, shown
from megatron_memory.reading.plain_data import check_extent

_END_OF_ZIP = struct.Struct("<4s4H2LH")
_DTYPE = re.compile(r"(bfloat16|float8_\w+|u?int\d+|float\d+|bool|complex\d+)")
_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    # Of the types that have no class of their own; its length is in bytes.
    "Untyped": torch.uint8,
}
_MOST_DIMENSIONS = 64
_MOST_ATTRIBUTES = 1_000_000
# A shared tuple of settings unfolds where it is referred to; by far not as often as this.
_UNFOLDED_PER_BYTE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInFile:
    """A tensor of a file, not loaded."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class FilePart(io.RawIOBase):
    """A range of an open file, as a file of its own; torch's own such class reads past its end."""

    def __init__(self, stream: IO[bytes], begin: int, length: int):
        super().__init__()
        self._stream, self._begin, self._length = stream, begin, length
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place in the part."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a place in the part, and return it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"a place before the beginning: {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._length - self._position))
        self._stream.seek(self._begin + self._position)
        read = self._stream.readinto(view[:count])  # type: ignore[attr-defined]
        self._position += read
        return read


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Storage:
    dtype: torch.dtype
    num_bytes: int


def load_torch_file(path: Path, *, mmap: bool = False) -> Any:
    """The value that `torch.save` wrote into a file, tensors on the CPU.

    Raises:
        UnsafeFile, OSError: it is damaged, holds code, or asks for more than it holds.
    """
    with open_regular(path) as stream:
        check_torch_stream(stream, verify=True)
    return _load(os.fspath(path), mmap=mmap)


def load_torch_part(path: Path, begin: int, length: int) -> Any:
    """The value that `torch.save` wrote into a part of a file.

    Raises:
        UnsafeFile, OSError: see `load_torch_file`.
    """
    with open_regular(path) as stream:
        part = FilePart(stream, begin, length)
        check_torch_stream(part, verify=True)
        return _load(part)


def _load(source: Any, *, mmap: bool = False) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    # torch raises RuntimeError, UnpicklingError, EOFError and others on a damaged file.
    except Exception as error:
        raise UnsafeFile(f"torch cannot load it: {error}") from error


def check_torch_stream(stream: IO[bytes] | FilePart, *, verify: bool = False) -> Any:
    """Check what `torch.save` wrote; leaves the stream at its beginning.

    Args:
        stream: the whole of it; can seek.
        verify: compare every member with its checksum in the file, not the description alone.

    Returns:
        the value, with a `TensorInFile` in place of each tensor.

    Raises:
        UnsafeFile: it is damaged, holds code, or asks for more than it holds.
    """
    size = stream.seek(0, os.SEEK_END)
    _check_ends(stream, size)
    try:
        with zipfile.ZipFile(stream) as archive:
            value = _described(archive, size)
            broken = archive.testzip() if verify else None
    except UnsafeFile:
        raise
    # zipfile raises BadZipFile, but also struct.error, UnicodeDecodeError, NotImplementedError.
    except Exception as error:
        raise UnsafeFile(f"its archive is damaged: {error or type(error).__name__}") from error
    if broken is not None:
        raise UnsafeFile(f"its member {broken} is damaged: its checksum is another")
    stream.seek(0)
    return value


def _check_ends(stream: IO[bytes] | FilePart, size: int) -> None:
    """zipfile and torch's own reader would both skip what lies around an archive, each its way."""
    stream.seek(0)
    begin = stream.read(4)
    stream.seek(max(0, size - _END_OF_ZIP.size))
    end = stream.read(_END_OF_ZIP.size)
    if not begin.startswith(b"PK\3\4") or len(end) < _END_OF_ZIP.size:
        raise UnsafeFile("it is cut off, or not of torch's format")
    signature, *_, comment = _END_OF_ZIP.unpack(end)
    if signature != b"PK\5\6" or comment:
        raise UnsafeFile("it is cut off, or not of torch's format: its archive does not end there")


def _described(archive: zipfile.ZipFile, size: int) -> Any:
    members = {member.filename: member for member in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise UnsafeFile("its archive has two members of one name")
    if min((member.header_offset for member in members.values()), default=0) != 0:
        raise UnsafeFile("something lies before its archive")
    for member in members.values():
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise UnsafeFile(f"its member {member.filename} is compressed, which torch never does")
    if sum(member.file_size for member in members.values()) > size:
        raise UnsafeFile("its archive's members are larger than it")
    described = [name for name in members if name.endswith("/data.pkl")]
    if len(described) != 1 or described[0].count("/") != 1:
        raise UnsafeFile("its archive has no data.pkl, or several")
    folder = described[0].removesuffix("data.pkl")
    content = archive.read(described[0])
    lengths = {
        name.removeprefix(f"{folder}data/"): member.file_size
        for name, member in members.items()
        if name.startswith(f"{folder}data/")
    }
    value = read_pickle(content, _find, persistent=partial(_storage, lengths))
    check_extent(value, _UNFOLDED_PER_BYTE * len(content))
    return value


def _storage(lengths: dict[str, int], reference: Any) -> _Storage:
    kind, storage_type, key, location, count = reference
    if (
        kind != "storage"
        or type(key) is not str
        or not isinstance(storage_type, torch.dtype)
        or type(location) is not str
    ):
        raise UnsafeFile(f"it refers to {shown(reference)}")
    if type(count) is not int or lengths.get(key) != count * storage_type.itemsize:
        raise UnsafeFile(f"a storage of {count} x {storage_type} has {lengths.get(key)} bytes")
    return _Storage(dtype=storage_type, num_bytes=lengths[key])


def _tensor(arguments: tuple[Any, ...]) -> TensorInFile:
    """Of `_rebuild_tensor_v2`: storage, offset, size, strides, requires_grad, hooks, metadata."""
    return _checked_tensor(arguments[0].dtype, *arguments[:6], *arguments[6:])


def _typed_tensor(arguments: tuple[Any, ...]) -> TensorInFile:
    """Of `_rebuild_tensor_v3`, which has the type behind the hooks."""
    return _checked_tensor(arguments[6], *arguments[:6], *arguments[7:])


def _checked_tensor(
    dtype: torch.dtype,
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: dict,
    metadata: dict | None = None,
) -> TensorInFile:
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise UnsafeFile(f"a tensor of shape {shown(shape)}, strides {shown(strides)}")
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS or hooks or metadata:
        raise UnsafeFile(f"a tensor of shape {shown(shape)} with more than its numbers")
    if type(requires_grad) is not bool or not isinstance(dtype, torch.dtype):
        raise UnsafeFile(f"a tensor of type {shown(dtype)}")
    available = storage.num_bytes // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count > available or (count and last >= available):
        raise UnsafeFile(f"a tensor of shape {list(shape)} of {available} numbers")
    return TensorInFile(dtype=dtype, shape=shape)


def _parameter(arguments: tuple[Any, ...]) -> TensorInFile:
    data, requires_grad, hooks = arguments
    if not isinstance(data, TensorInFile) or type(requires_grad) is not bool or hooks:
        raise UnsafeFile("a parameter that is no tensor")
    return data


def _sizes(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    (sizes,) = arguments
    if type(sizes) is not tuple or not all(type(size) is int for size in sizes):
        raise UnsafeFile("a torch.Size that is no list of numbers")
    return sizes


def _text(arguments: tuple[Any, ...]) -> str:
    (text,) = arguments
    if type(text) is not str:
        raise UnsafeFile("a device that is no text")
    return text


def _bytes(arguments: tuple[Any, ...]) -> bytes:
    """How protocol 2 writes bytes."""
    text, encoding = arguments
    if type(text) is not str or encoding != "latin1":
        raise UnsafeFile("bytes that are none")
    return text.encode("latin1")


def _empty(make: Callable[[], Any], arguments: tuple[Any, ...]) -> Any:
    if arguments:
        raise UnsafeFile("a dict that is made of something")
    return make()


def _attributes(_: dict, state: Any) -> None:
    """What torch's state dicts carry beside their items."""
    if type(state) is not dict or state.keys() - {"_metadata"}:
        raise UnsafeFile("a dict has attributes")
    check_extent(state, _MOST_ATTRIBUTES)


class _Opaque:
    """What torch makes of it, where megatron-core has told it that it may."""


def _opaque(name: str, call: Callable[[tuple[Any, ...]], Any] | None = None) -> Maker:
    return Maker(
        name=name,
        call=call or (lambda arguments: _Opaque()),
        new=_Opaque,
        fill=lambda made, state: check_extent(state, _MOST_ATTRIBUTES),
    )


def _array(arguments: tuple[Any, ...]) -> _Opaque:
    """An empty array, which gets its numbers afterwards."""
    if arguments[1:] != ((0,), b"b"):
        raise UnsafeFile("a NumPy array that is made of something")
    return _Opaque()


def _numpy_type(arguments: tuple[Any, ...]) -> _Opaque:
    if not all(type(part) is bool for part in arguments[1:]) or len(_text(arguments[:1])) > 3:
        raise UnsafeFile("a NumPy type that is none of numbers")
    return _Opaque()


# Of megatron-core's `safe_globals`: what Megatron-LM's own checkpoints have in common.pt, and
# Transformer Engine's layers as their extra state.
_OPAQUE = {
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "signal": ("Signals",),
    "io": ("BytesIO",),
    "_io": ("BytesIO",),
    "megatron.core.enums": ("ModelType",),
    "megatron.core.optimizer.optimizer_config": ("OptimizerConfig",),
    "megatron.core.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
    "megatron.core.transformer.enums": ("AttnBackend", "CudaGraphScope"),
    "numpy": ("ndarray",),
    "numpy.dtypes": ("UInt32DType",),
}


def _makers() -> Iterator[Maker]:
    for module, names in _OPAQUE.items():
        yield from (_opaque(f"{module}.{name}") for name in names)
    yield _opaque("numpy.core.multiarray._reconstruct", _array)
    yield _opaque("numpy._core.multiarray._reconstruct", _array)
    yield _opaque("numpy.dtype", _numpy_type)
    yield Maker(name="torch._utils._rebuild_tensor_v2", call=_tensor)
    yield Maker(name="torch._utils._rebuild_tensor_v3", call=_typed_tensor)
    yield Maker(name="torch._utils._rebuild_parameter", call=_parameter)
    yield Maker(name="collections.OrderedDict", call=partial(_empty, dict), fill=_attributes)
    yield Maker(name="torch.Size", call=_sizes)
    yield Maker(name="torch.device", call=_text)
    yield Maker(name="_codecs.encode", call=_bytes)


_KNOWN: dict[str, Any] = {maker.name: maker for maker in _makers()}
_KNOWN |= {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_KNOWN["torch.storage.UntypedStorage"] = torch.uint8


def _find(module: str, name: str) -> Any:
    called = f"{module}.{name}"
    if called in _KNOWN:
        return _KNOWN[called]
    found = dtype_called(module, name)
    if found is None:
        raise UnsafeFile(f"it refers to {called:.200}, which no checkpoint needs")
    return found


def dtype_called(module: str, name: str) -> torch.dtype | None:
    """The type of numbers that a pickle names so; None where it is none."""
    if module != "torch" or not _DTYPE.fullmatch(name):
        return None
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None
