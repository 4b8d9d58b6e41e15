"""10,000 damaged files of every kind that is read: refused by name, or read as what they say.

`SOAK=1 python -m pytest tests/soak/test_hostile_files.py -s` prints what was counted.
"""

import json
import random
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_memory.config import load_config, save_config
from megatron_memory.conversion.dcp_files import StoredTensors, write_dcp
from megatron_memory.conversion.hf import read_hf
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.lingua import read_lingua
from megatron_memory.conversion.safetensors_files import read_safetensors
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.data.index_files import check_indexed_dataset
from megatron_memory.exceptions import USER_ERRORS, CheckpointError
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import load_torch_file
from megatron_memory.training.checkpoint.integrity import check_stored
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from tests.bounded import within
from tests.conversion.states import golden_checkpoint, save_hf_model
from tests.data.helpers import random_documents, write_dataset
from tests.hostile import mutated, mutated_json
from tests.soak import hostile_kinds
from tests.soak.rounds import rounds
from tests.training.tiny_runs import tiny_config

MIB = 1 << 20
LIMIT = 1024 * MIB
"""Of address space that a reader may ask for; the files have less than 1 MiB."""
GROWTH = 128 * MIB
"""Of memory in use, over all files of a kind."""
_SECONDS = 600


def _lingua(folder: Path) -> None:
    shutil.copytree(golden_checkpoint("peer"), folder)


def _consolidated(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(golden_checkpoint("peer") / "params.json", folder)
    tensors = StoredTensors(golden_checkpoint("peer"), read_metadata(golden_checkpoint("peer")))
    model = {n: t.read() for n, t in tensors.tensors().items() if n.startswith("model.")}
    model = {name.removeprefix("model."): tensor for name, tensor in model.items()}
    torch.save({"model": model}, folder / "consolidated.pth")


def _hf(folder: Path) -> None:
    save_hf_model("llama", folder)


def _shards(folder: Path) -> None:
    save_hf_model("llama", folder, max_shard_size="40KB")


def _pickled(folder: Path) -> None:
    model = save_hf_model("llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


_NAMES = ("model.a", "model.b", "optim.c")


def _dcp(folder: Path) -> None:
    folder.mkdir()
    tensors = {name: from_memory(torch.full((4, 3), i)) for i, name in enumerate(_NAMES)}
    write_dcp(folder, tensors, {"d": [1, "two"]})


def _archive(folder: Path) -> None:
    folder.mkdir()
    torch.save({"iteration": 4, "layout": {"data": 2}, "t": torch.arange(9)}, folder / "common.pt")


def _settings(folder: Path) -> None:
    folder.mkdir()
    save_config(tiny_config(str(folder / "tokens")), folder / "config.yaml")


def _pair(folder: Path) -> None:
    folder.mkdir()
    write_dataset(folder / "data", [*random_documents(20), []])


def _weights(tensors: Tensors) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in tensors.items()}


def _read_dcp(folder: Path) -> dict[str, Any]:
    metadata = read_metadata(folder)
    check_stored(folder, metadata)
    found = StoredTensors(folder, metadata).tensors()
    if not set(_NAMES) <= found.keys():
        raise CheckpointError("what a loader asks for by its name is missing")
    return {name: found[name].read() for name in _NAMES}


def _read_archive(folder: Path) -> Any:
    try:
        return load_torch_file(folder / "common.pt")
    except UnsafeFile as error:
        raise CheckpointError(str(error)) from error


def _read_lingua(folder: Path) -> dict[str, Any]:
    return _weights(read_lingua(folder).weights)


def _read_hf(folder: Path) -> dict[str, Any]:
    return _weights(read_hf(folder).weights)


def _read_position(folder: Path) -> int:
    return read_lingua(folder).iteration


def _read_settings(folder: Path) -> None:
    """What is read, written down and read again, is the same: the file said it."""
    config = load_config(folder / "config.yaml")
    save_config(config, folder / "again.yaml")
    assert load_config(folder / "again.yaml") == config


def _read_header(folder: Path) -> None:
    """By the format's description: a header, and the numbers where it says that they are."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    found = _weights(read_safetensors(path))
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert found.keys() == header.keys()
    for name, said in header.items():
        begin, end = said["data_offsets"]
        assert list(found[name].shape) == said["shape"]
        numbers = found[name].contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert numbers == content[8 + length + begin : 8 + length + end]


def _read_pair(folder: Path) -> np.ndarray:
    summary = check_indexed_dataset(str(folder / "data"))
    bounds, lengths = summary.document_bounds, summary.sequence_lengths
    assert sum(map(len, np.split(lengths, bounds[1:-1]))) == summary.num_sequences
    return np.fromfile(folder / "data.bin", summary.dtype)


CASES: dict[str, tuple[Callable, Callable, str, int | None, int]] = {
    "dcp-list": (_dcp, _read_dcp, ".metadata", None, 3000),
    "dcp-tensors": (_dcp, _read_dcp, "__0_0.distcp", None, 1500),
    "archive": (_archive, _read_archive, "common.pt", None, 1500),
    "settings": (_settings, _read_settings, "config.yaml", None, 500),
    "index": (_pair, _read_pair, "data.idx", None, 1500),
    "safetensors": (_hf, _read_header, "model.safetensors", 3000, 500),
    "lingua-params": (
        _lingua,
        _read_lingua,
        "params.json",
        None,
        200,
    ),
    "lingua-position": (_lingua, _read_position, "train_state_00000.json", None, 100),
    "lingua-consolidated": (
        _consolidated,
        _read_lingua,
        "consolidated.pth",
        None,
        300,
    ),
    "hf-config": (_hf, _read_hf, "config.json", None, 300),
    "hf-index": (
        _shards,
        _read_hf,
        "model.safetensors.index.json",
        None,
        300,
    ),
    "hf-pickle": (
        _pickled,
        _read_hf,
        "pytorch_model.bin",
        None,
        300,
    ),
} | hostile_kinds.CASES
"""How to make a sound one, the function to read it with, the file to damage, how much of its
beginning (None: all), and how often."""


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return np.array_equal(one, other)


def _hangs(number: int, frame: object) -> None:
    raise AssertionError("it hangs")


@pytest.fixture
def no_hang():
    before = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("case", CASES)
def test_damage_is_refused_or_harmless(case: str, tmp_path: Path):
    make, read, name, head, whole = CASES[case]
    # A checkpoint of lingua must say the position that its folder is named after.
    folder = tmp_path / "0000000024"
    make(folder)
    content, choose = (
        (folder / name).read_bytes(),
        random.Random(case),
    )
    expected, refused, times = read(folder), 0, rounds(whole)

    def damage_and_read() -> None:
        nonlocal refused
        for number in range(times):
            # Written anew: to write over a file makes the file system bring it to the disk.
            (folder / name).unlink()
            by_value = name.endswith(".json") and choose.random() < 0.5
            damaged = mutated_json(content, choose) if by_value else mutated(content, choose, head)
            (folder / name).write_bytes(damaged)
            try:
                found = read(folder)
            except USER_ERRORS as error:
                assert len(str(error)) > 20 and "MemoryError" not in str(error), str(error)
                refused += 1
                continue
            except AssertionError:
                raise
            except Exception as error:
                raise AssertionError(f"mutation {number} of {name}: {error!r}") from error
            assert _same(found, expected), f"mutation {number} of {name} is silent"

    grown = within(LIMIT, damage_and_read)
    print(f"\n{case}: {times} damages, {refused} refused, 0 silent; {grown / MIB:.0f} MiB")
    assert grown < GROWTH
    # Many changes are to what matters, and there the reader must have looked. What a dead run's
    # lease says matters to nobody.
    assert refused > times // 10 or case == "lease"
