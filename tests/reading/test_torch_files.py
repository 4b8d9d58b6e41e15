"""Files of torch.save are looked through before torch opens them."""

import collections
import io
import random
import time
from pathlib import Path

import pytest
import torch

from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import (
    FilePart,
    TensorInFile,
    check_torch_stream,
    load_torch_file,
    load_torch_part,
)
from tests.bounded import within
from tests.hostile import hostile_archives, mutated, named, rewritten, sound_archive

MIB = 1 << 20


def _state_dict() -> collections.OrderedDict:
    """With `_metadata`, as those of modules have."""
    return torch.nn.Linear(3, 2).state_dict()


VALUES = {
    "tensor": torch.arange(6.0).reshape(2, 3),
    "view": torch.arange(10)[2:5],
    "transposed": torch.arange(6).reshape(2, 3).T,
    "scalar": torch.tensor(3, dtype=torch.bfloat16),
    "empty": torch.empty(0, 5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "fp8": torch.ones(4).to(torch.float8_e4m3fn),
    "uint16": torch.ones(3, dtype=torch.uint16),
    "bool": torch.tensor([True, False]),
    "modules": _state_dict(),
    "others": [1, 2.5, None, True, (1, 2), "x", b"abc", 2**63, torch.Size([1]), torch.float16],
    "device": torch.device("cpu"),
}


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.shape, one.dtype) == (other.shape, other.dtype)
            and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


def test_what_was_saved_is_loaded(tmp_path: Path):
    path = tmp_path / "saved.pt"
    path.write_bytes(b"before" + _saved(VALUES) + b"behind")
    loaded = load_torch_part(path, 6, path.stat().st_size - 12)
    assert all(_same(loaded[name], value) for name, value in VALUES.items())
    path.write_bytes(_saved(VALUES))
    for mmap in (False, True):
        loaded = load_torch_file(path, mmap=mmap)
        assert all(_same(loaded[name], value) for name, value in VALUES.items())


def test_a_description_needs_no_tensor():
    described = check_torch_stream(io.BytesIO(_saved(VALUES)))
    for name, value in VALUES.items():
        if isinstance(value, torch.Tensor):
            assert described[name] == TensorInFile(dtype=value.dtype, shape=tuple(value.shape))


def test_a_part_is_a_file_of_its_own(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as stream:
        part = FilePart(stream, 10, 5)
        assert part.read() == bytes(range(10, 15)) and part.read(3) == b""
        assert part.seek(-2, io.SEEK_END) == 3 and part.read(9) == bytes([13, 14])
        part.seek(9)
        assert part.read(1) == b""
        with pytest.raises(ValueError, match="before the beginning"):
            part.seek(-1)


@pytest.mark.parametrize(("name", "content"), [*hostile_archives()], ids=named)
def test_hostile_archives_are_refused(name: str, content: bytes, tmp_path: Path):
    path = tmp_path / "hostile.pt"
    path.write_bytes(content)

    def read() -> None:
        with pytest.raises(UnsafeFile) as caught:
            load_torch_file(path)
        assert str(caught.value) and "MemoryError" not in str(caught.value)

    begin = time.process_time()
    assert within(1024 * MIB, read) < 64 * MIB + 200 * len(content)
    assert time.process_time() - begin < 10


def test_a_sound_archive_written_by_zipfile_is_none_of_them(tmp_path: Path):
    path = tmp_path / "sound.pt"
    path.write_bytes(rewritten(sound_archive(), {}))
    assert load_torch_file(path)["b"] == [1, 2.5, "x", None]


def test_mutations_are_refused_or_change_nothing(tmp_path: Path):
    original, choose = _saved(VALUES), random.Random(1)
    path, accepted = tmp_path / "mutated.pt", 0
    for number in range(300):
        changed = mutated(original, choose)
        path.write_bytes(changed)
        try:
            loaded = load_torch_file(path)
        except UnsafeFile as error:
            assert str(error)
            continue
        accepted += 1
        assert loaded.keys() == VALUES.keys(), number
        assert all(_same(loaded[name], value) for name, value in VALUES.items()), number
    # There are bytes in an archive that nobody reads, such as the time of its members.
    assert 3 < accepted < 200
