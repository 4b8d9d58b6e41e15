"""`.metadata` is what it was, or refused; never run, and never larger than itself."""

import pickle
import random
import time
from pathlib import Path

import pytest
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
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.coverage import check_coverage
from megatron_memory.training.checkpoint.metadata_file import METADATA_FILE, read_metadata
from tests.bounded import within
from tests.conversion.states import golden_checkpoint
from tests.hostile import hostile_pickles, mutated, named

MIB = 1 << 20


def _metadata(boxes: list[tuple[tuple, tuple]], size: tuple = (4, 6), **fields) -> Metadata:
    """One float32 tensor "x" cut into (offsets, sizes), and one object "y"."""
    places, begin = {}, 0
    for offsets, sizes in boxes:
        length = 4 * torch.Size(sizes).numel() + 100
        index = MetadataIndex("x", torch.Size(offsets))
        places[index] = _StorageInfo("__0_0.distcp", begin, length)
        begin += length
    places[MetadataIndex("y")] = _StorageInfo("__0_1.distcp", 0, 10)
    chunks = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in boxes]
    properties = TensorProperties(dtype=torch.float32)
    return Metadata(
        state_dict_metadata={
            "x": TensorStorageMetadata(properties, torch.Size(size), chunks),
            "y": BytesStorageMetadata(),
        },
        storage_data=places,
        **fields,
    )


HALVES = [((0, 0), (2, 6)), ((2, 0), (2, 6))]


def _write(folder: Path, metadata: object, protocol: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata, protocol))
    return folder


def _same(read: Metadata, written: Metadata) -> bool:
    """In all that is read of it."""
    return (
        read.state_dict_metadata == written.state_dict_metadata
        and read.storage_data == written.storage_data
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_wrote_is_read(protocol: int, tmp_path: Path):
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 6)))
    data = TensorWriteData(chunk, TensorProperties(), torch.Size((4, 6)))
    plan = SavePlan([WriteItem(MetadataIndex("x"), WriteItemType.SHARD, data)], planner_data={})
    metadata = _metadata(
        HALVES,
        planner_data={"x": ("a", 0)},
        storage_meta=StorageMeta(checkpoint_id=Path("/somewhere/else"), save_id="s"),
        version="1.0.0",
    )
    # megatron-core adds it.
    metadata.all_local_plans = [plan]
    read = read_metadata(_write(tmp_path / "c", metadata, protocol))
    assert _same(read, metadata) and read.version == "1.0.0"
    assert read.planner_data is None and read.storage_meta == StorageMeta()
    check_coverage(read)


@pytest.mark.parametrize("name", ["memory_plus", "memory_gqa_vdim", "peer"])
def test_what_the_reference_wrote_is_read(name: str):
    folder = golden_checkpoint(name)
    read = read_metadata(folder)
    assert _same(read, pickle.loads((folder / METADATA_FILE).read_bytes()))
    check_coverage(read)


@pytest.mark.parametrize(("name", "content"), [*hostile_pickles()], ids=named)
def test_hostile_lists_are_refused(name: str, content: bytes, tmp_path: Path):
    (tmp_path / METADATA_FILE).write_bytes(content)

    def read() -> None:
        with pytest.raises(CheckpointError) as caught:
            read_metadata(tmp_path)
        reason = str(caught.value).removeprefix(f"{tmp_path / METADATA_FILE} is damaged: ")
        assert 5 < len(reason) < 400 and "MemoryError" not in reason

    before = {cls: dict(cls.__dict__) for cls in (Metadata, WriteItemType, MetadataIndex)}
    begin = time.process_time()
    assert within(1024 * MIB, read) < 64 * MIB + 200 * len(content)
    assert time.process_time() - begin < 10
    assert before == {cls: dict(cls.__dict__) for cls in before}


class _Reduced:
    def __init__(self, *parts: object):
        self.parts = parts

    def __reduce__(self):
        return self.parts


def _changed(**fields: object) -> Metadata:
    metadata = _metadata(HALVES)
    metadata.__dict__.update(fields)
    return metadata


@pytest.mark.parametrize(
    "written",
    [
        _changed(state_dict_metadata=[]),
        _changed(state_dict_metadata={1: BytesStorageMetadata()}),
        _changed(state_dict_metadata={"x": "y"}),
        _changed(storage_data=None),
        _changed(storage_data={MetadataIndex("x"): "somewhere"}),
        _changed(storage_data={MetadataIndex("x"): _StorageInfo("a", -1, 5)}),
        _changed(storage_data={MetadataIndex("x"): _StorageInfo("a", 0, -5)}),
        _changed(storage_data={MetadataIndex("x"): _StorageInfo("a", 0.0, 5)}),
        _changed(storage_data={MetadataIndex("x"): _StorageInfo("a", 0, 2**63)}),
        _changed(storage_data={MetadataIndex("x"): _StorageInfo("a", 0, 5, ["zstd"])}),
        _changed(storage_data={MetadataIndex(b"x"): _StorageInfo("a", 0, 5)}),
        _changed(version=1),
        _changed(unknown=1),
        _metadata([((0, 0), (-2, 6))], size=(-2, 6)),
        _Reduced(torch.Size, ([4, 6],)),
        _Reduced(torch.Size, ((4, True),)),
        _Reduced(torch.Size, ((4,), 1)),
        _Reduced(torch.device, ("cpu",)),
        _Reduced(getattr, (WriteItemType, "__class__")),
        _Reduced(Metadata, ({}, None, {})),
        MetadataIndex("x"),
        torch.float32,
        Metadata,
        [],
    ],
    ids=lambda written: type(written).__name__,
)
def test_what_no_writer_writes_is_refused(written: object, tmp_path: Path):
    with pytest.raises(CheckpointError, match="is damaged: .") as caught:
        read_metadata(_write(tmp_path / "c", written))
    assert "Traceback" not in str(caught.value)


SOUND = [
    HALVES,
    [((0, 0), (4, 6))],
    # Three rectangles of a flat range that two ranks share, as an optimizer's states are cut.
    [((0, 0), (1, 6)), ((1, 0), (1, 4)), ((1, 4), (1, 2)), ((2, 0), (2, 6))],
    # Two blocks of columns, cut in different rows.
    [((0, 0), (1, 3)), ((1, 0), (3, 3)), ((0, 3), (2, 3)), ((2, 3), (2, 3))],
    # In rings, so that no straight cut divides them.
    [((0, 0), (1, 4)), ((0, 4), (3, 2)), ((3, 2), (1, 4)), ((1, 0), (3, 2)), ((1, 2), (2, 2))],
    # Parts without numbers.
    [*HALVES, ((4, 0), (0, 6))],
]
UNSOUND = [
    ([HALVES[0]], "some are missing"),
    ([], "some are missing"),
    ([*HALVES, ((3, 0), (1, 6))], "some are missing or twice"),
    ([((0, 0), (2, 6)), ((1, 0), (2, 6))], "overlap"),
    ([((0, 0), (2, 6)), ((2, 0), (3, 6))], "outside of its shape"),
    ([((0, 0), (2, 6)), ((2,), (2,))], "is cut as"),
    # The rings with one of them moved onto another.
    (
        [((0, 0), (1, 4)), ((0, 4), (3, 2)), ((3, 2), (1, 4)), ((1, 0), (3, 2)), ((1, 1), (2, 2))],
        "overlap",
    ),
]


@pytest.mark.parametrize("boxes", SOUND)
def test_tensors_that_are_whole(boxes: list, tmp_path: Path):
    check_coverage(read_metadata(_write(tmp_path / "c", _metadata(boxes))))


@pytest.mark.parametrize(("boxes", "reason"), UNSOUND)
def test_tensors_that_are_not(boxes: list, reason: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"x .*{reason}|{reason}.* x |parts of x {reason}"):
        check_coverage(read_metadata(_write(tmp_path / "c", _metadata(boxes))))


def test_a_table_in_many_parts_is_checked_in_seconds():
    boxes = [((i, 0), (1, 3)) for i in range(20_000)]
    boxes += [((i, 3), (2, 3)) for i in range(0, 20_000, 2)]
    begin = time.process_time()
    check_coverage(_metadata(boxes, size=(20_000, 6)))
    assert time.process_time() - begin < 20


def test_places_in_the_files():
    metadata = _metadata(HALVES)
    first, second, third = metadata.storage_data
    sound = dict(metadata.storage_data)

    def check(message: str, changes: dict) -> None:
        metadata.storage_data = {k: v for k, v in (sound | changes).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            check_coverage(metadata)

    check("part of x at .2, 0. has no place", {second: None})
    check("y has no place", {third: None})
    check("a part of z that is not listed", {MetadataIndex("z"): sound[first]})
    check("two parts lie at byte 10", {second: _StorageInfo("__0_0.distcp", 10, 200)})
    check("takes 48 bytes, and has a place of 47", {second: _StorageInfo("__0_2.distcp", 0, 47)})
    check("outside of the checkpoint", {third: _StorageInfo("../other", 0, 10)})


def test_mutations_are_refused_or_change_nothing_that_is_read(tmp_path: Path):
    """A name, a type or a version may be another one: the first is then not found, the second
    is not what is stored, and nobody reads the third."""
    metadata = _metadata(SOUND[2], version="1.0.0")
    original, choose, accepted = pickle.dumps(metadata), random.Random(2), 0
    for number in range(1500):
        (tmp_path / METADATA_FILE).write_bytes(mutated(original, choose))
        try:
            read = read_metadata(tmp_path)
            check_coverage(read)
        except (CheckpointError, ValueError) as error:
            assert str(error)
            continue
        accepted += 1
        renamed = {name for name in read.state_dict_metadata if name not in "xy"}
        if not renamed:
            tensor = read.state_dict_metadata["x"]
            expected = metadata.state_dict_metadata["x"]
            assert (tensor.size, tensor.chunks) == (expected.size, expected.chunks), number
    assert 2 < accepted < 500
