"""The files themselves: blocks, hostile content, damage, full or contested places."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_memory.conversion import lazy
from megatron_memory.conversion.convert import read_checkpoint
from megatron_memory.conversion.dcp_files import StoredTensors, write_dcp
from megatron_memory.conversion.folders import output_folder
from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.safetensors_files import read_weight_files, write_weight_files
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.checksums import write_sums
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from tests.bounded import within
from tests.conversion.states import (
    assert_same_tensors,
    golden_checkpoint,
    read_all,
    save_hf_model,
)
from tests.hostile import hostile_safetensors
from tests.memory_growth import growth

MIB = 2**20
TENSORS = {
    "matrix": torch.arange(70.0).view(10, 7),
    "half": torch.arange(24.0).view(2, 3, 4).bfloat16(),
    "vector": torch.arange(5),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.5),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row or two of the tensors here."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 50)


def _write_dcp(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    write_dcp(folder, tensors)


def _read_dcp(folder: Path) -> dict[str, LazyTensor]:
    return StoredTensors(folder, read_metadata(folder)).tensors()


def _write_safetensors(folder: Path, tensors: dict[str, LazyTensor]) -> None:
    write_weight_files(folder, tensors, max_shard_bytes=200)


FILES = {
    "dcp": (_write_dcp, _read_dcp),
    "safetensors": (_write_safetensors, read_weight_files),
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", FILES)
def test_blocks_make_the_tensors(kind: str, tmp_path: Path):
    write, read = FILES[kind]
    write(tmp_path, {name: from_memory(tensor) for name, tensor in TENSORS.items()})
    found = read(tmp_path)
    assert_same_tensors(read_all(found), TENSORS)
    assert torch.equal(found["matrix"].read_rows(3, 8), TENSORS["matrix"][3:8])
    assert len(list(found["matrix"].blocks())) == 10


def test_safetensors_reads_what_is_written(tmp_path: Path):
    """By the format's own library."""
    _write_safetensors(tmp_path, {name: from_memory(tensor) for name, tensor in TENSORS.items()})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert_same_tensors({n: t for file in files for n, t in load_file(file).items()}, TENSORS)


@pytest.mark.parametrize("kind", FILES)
def test_memory_is_that_of_a_few_blocks(kind: str, tmp_path: Path, monkeypatch):
    """A table of 192 MiB is written, read back and converted in blocks of 4."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 4 * MIB)
    table = LazyTensor(
        shape=(192 * 1024, 256),
        dtype=torch.float32,
        read_rows=lambda begin, end: torch.full((end - begin, 256), float(begin)),
    )
    write, read = FILES[kind]
    assert growth(lambda: write(tmp_path, {"table": table})) < 48 * MIB

    def read_blocks() -> None:
        stored = read(tmp_path)["table"].to(torch.bfloat16).with_zero_rows(192 * 1024 + 64)
        for begin, end in stored.blocks():
            assert stored.read_rows(begin, end).shape[0] == end - begin

    assert growth(read_blocks) < 48 * MIB


@pytest.mark.parametrize(
    "number, narrow", [(3.4e38, torch.bfloat16), (-1e300, torch.float32), (1e5, torch.float16)]
)
def test_a_number_beyond_a_type_is_told(number: float, narrow: torch.dtype):
    wide = torch.float64 if abs(number) > 1e39 else torch.float32
    tensor = torch.tensor([1.0, math.inf, -math.inf, math.nan, number], dtype=wide)
    kept = from_memory(tensor[:4]).to(narrow, "rows").read()
    assert kept[:3].tolist() == [1.0, math.inf, -math.inf] and bool(kept[3].isnan())
    with pytest.raises(CheckpointError, match=r"rows has the number .*, which .* cannot hold"):
        from_memory(tensor).to(narrow, "rows").read()


class _Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


def _hostile_metadata(folder: Path, trap: Path) -> str:
    shutil.copytree(golden_checkpoint("peer"), folder)
    (folder / ".metadata").write_bytes(pickle.dumps(_Hostile(trap)))
    return "lingua"


def _hostile_piece(folder: Path, trap: Path) -> str:
    """The list is sound; what stands at a tensor's place is not."""
    shutil.copytree(golden_checkpoint("peer"), folder)
    length = (folder / "__0_0.distcp").stat().st_size
    torch.save(_Hostile(trap), folder / "hostile")
    hostile = (folder / "hostile").read_bytes()
    metadata = read_metadata(folder)
    for place in metadata.storage_data.values():
        place.offset, place.length = length, len(hostile)  # of all tensors
    with open(folder / "__0_0.distcp", "ab") as file:
        file.write(hostile)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return "lingua"


def _hostile_consolidated(folder: Path, trap: Path) -> str:
    folder.mkdir()
    shutil.copy(golden_checkpoint("peer") / "params.json", folder)
    torch.save({"model": _Hostile(trap)}, folder / "consolidated.pth")
    return "lingua"


def _hostile_bin(folder: Path, trap: Path) -> str:
    save_hf_model("llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Hostile(trap)}, folder / "pytorch_model.bin")
    return "hf"


def _hostile_code(folder: Path, trap: Path) -> str:
    """A configuration that asks transformers to run a file beside it."""
    save_hf_model("llama", folder)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    text = (folder / "config.json").read_text()
    changed = text.replace('"model_type": "llama"', '"model_type": "hostile"')
    auto_map = '{"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},'
    (folder / "config.json").write_text(changed.replace("{", auto_map, 1))
    return "hf"


@pytest.mark.parametrize(
    "make",
    [_hostile_metadata, _hostile_piece, _hostile_consolidated, _hostile_bin, _hostile_code],
)
def test_no_code_of_a_checkpoint_is_run(make: Callable[[Path, Path], str], tmp_path: Path):
    trap = tmp_path / "trap"
    format_name = make(tmp_path / "hostile", trap)
    with pytest.raises(CheckpointError):
        read_all(read_checkpoint(format_name, tmp_path / "hostile").weights)
    assert not trap.exists()


def test_output_appears_when_it_is_complete(tmp_path: Path):
    save = tmp_path / "deep" / "out"
    with output_folder(save) as folder:
        (folder / "file").write_text("all")
        assert not save.exists()
    assert (save / "file").read_text() == "all"
    assert [path.name for path in save.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError, SystemExit])
def test_failure_leaves_nothing(error: type[BaseException], tmp_path: Path):
    expected = CheckpointError if error is OSError else error
    with pytest.raises(expected), output_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_kept(tmp_path: Path):
    """Before the start, and when another program writes the same folder meanwhile."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"), output_folder(tmp_path / "old"):
        raise AssertionError("it must not start")
    with (
        pytest.raises(CheckpointError, match="written there meanwhile"),
        output_folder(tmp_path / "new") as folder,
    ):
        (folder / "file").write_text("second")
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "file").write_text("first")
    assert (tmp_path / "new" / "file").read_text() == "first"
    assert (tmp_path / "old" / "file").read_text() == "mine"


def test_a_folder_of_a_process_with_the_same_number_is_kept(tmp_path: Path, monkeypatch):
    """Of another host, or of one that was killed."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with output_folder(tmp_path / "out") as first:
        with output_folder(tmp_path / "out") as second:
            (second / "file").write_text("second")
        shutil.rmtree(tmp_path / "out")
        (first / "file").write_text("first")
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_a_symbolic_link_is_told_before_the_work(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with (
        pytest.raises(CheckpointError, match="symbolic link"),
        output_folder(tmp_path / "link"),
    ):
        raise AssertionError("it must not start")


def test_a_place_for_no_new_folder_is_told_before_the_work(tmp_path: Path):
    write_sums(tmp_path, "xxh3_128")
    for save, message in (
        ("", "is no name of a folder"),
        (".", "is no name of a folder"),
        (tmp_path / "..", "is no name of a folder"),
        (tmp_path / "x" / "new", f"lies in the checkpoint {tmp_path}"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(CheckpointError, match=message), output_folder(Path(save)):
            raise AssertionError("it must not start")


_ON_A_SMALL_DISK = """
import subprocess, sys, torch
from pathlib import Path
from megatron_memory.conversion.dcp_files import write_dcp
from megatron_memory.conversion.folders import output_folder
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.safetensors_files import write_weight_files
from megatron_memory.exceptions import CheckpointError

disk = Path(sys.argv[1])
if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
    sys.exit(77)
tensors = {"table": from_memory(torch.zeros(2**20))}
for write in (write_dcp, lambda folder, tensors: write_weight_files(folder, tensors, 10**9)):
    try:
        with output_folder(disk / "out") as folder:
            write(folder, tensors)
    except CheckpointError as error:
        print(error)
    print(*disk.iterdir())
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, to mount a small disk")
def test_full_disk_is_told_and_leaves_nothing(tmp_path: Path):
    run = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", _ON_A_SMALL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if run.returncode == 77 or run.stderr.startswith("unshare"):
        pytest.skip(f"this machine lets nobody mount a small disk: {run.stderr.strip()}")
    lines = run.stdout.splitlines()
    assert len(lines) == 4 and lines[1] == lines[3] == "", run.stderr
    for line in (lines[0], lines[2]):
        assert "--save" in line and "No space left on device" in line


@pytest.mark.parametrize(("name", "content"), hostile_safetensors())
def test_a_header_that_is_not_that_of_its_numbers(name: str, content: bytes, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    def read() -> None:
        with pytest.raises(CheckpointError, match="model.safetensors") as caught:
            read_all(read_weight_files(tmp_path))
        assert len(str(caught.value)) < 1000

    assert within(512 * MIB, read) < 64 * MIB


def test_one_file_beside_shards_is_refused(tmp_path: Path):
    """transformers reads the first, and other programs the second."""
    save_hf_model("llama", tmp_path, max_shard_size="40KB")
    shutil.copy(next(tmp_path.glob("*.safetensors")), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds model.safetensors and .*index.json"):
        read_weight_files(tmp_path)


def test_weights_beside_those_that_are_read(tmp_path: Path):
    """An adapter makes another model, with peft; of other files it is said that they are left."""
    save_hf_model("llama", tmp_path)
    assert read_checkpoint("hf", tmp_path).notes == ()
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "consolidated.safetensors")
    torch.save({}, tmp_path / "pytorch_model.bin")
    (note,) = read_checkpoint("hf", tmp_path).notes
    assert note.startswith("not read") and "consolidated.safetensors, pytorch_model.bin" in note
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors is an adapter.*Merge"):
        read_checkpoint("hf", tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(tmp_path: Path):
    save_hf_model("llama", tmp_path, max_shard_size="40KB")
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    name, stale = next(iter(load_file(first).items()))
    save_file(load_file(last) | {name: stale + 1}, last, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{last.name} holds {name}, which .*{first.name}"):
        read_weight_files(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [[["a", "b"]], "x", {"a": 1}, {"a": "x" * 300}, {"a": "../x"}]
)
def test_an_index_that_names_no_files(weight_map: object, tmp_path: Path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="index.json"):
        read_weight_files(tmp_path)


def test_a_folder_whose_name_is_no_text(tmp_path: Path):
    """torch writes the name into the list of tensors."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_dcp(folder, {"a": from_memory(torch.arange(3))}, {})
    found = StoredTensors(folder, read_metadata(folder)).tensors()
    assert torch.equal(found["a"].read(), torch.arange(3))
