"""Thousands of damaged checkpoints: our own errors or tensors, nothing else, and no hang."""

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_memory.conversion.dcp_files import StoredTensors, write_dcp
from megatron_memory.conversion.hf import read_hf
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.lingua import read_lingua
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.integrity import check_stored
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from tests.conversion.states import golden_checkpoint, save_hf_model

_SECONDS = 60
_TEXT = (b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"9" * 30, b"true", b"0", b"../x")


def _lingua(folder: Path) -> None:
    shutil.copytree(golden_checkpoint("peer"), folder)


def _consolidated(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(golden_checkpoint("peer") / "params.json", folder)
    torch.save({"model": {"norm.weight": torch.ones(64)}}, folder / "consolidated.pth")


def _hf(folder: Path) -> None:
    save_hf_model("llama", folder)


def _shards(folder: Path) -> None:
    save_hf_model("llama", folder, max_shard_size="40KB")


def _pickled(folder: Path) -> None:
    model = save_hf_model("llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _dcp(folder: Path) -> None:
    folder.mkdir()
    names = ("model.a", "model.b", "optim.c")
    write_dcp(folder, {name: from_memory(torch.ones(4, 3)) for name in names}, {"d": [1, "two"]})


def _read_dcp(folder: Path) -> Tensors:
    metadata = read_metadata(folder)
    check_stored(folder, metadata)
    return StoredTensors(folder, metadata).tensors()


def _read_lingua(folder: Path) -> Tensors:
    return read_lingua(folder).weights


def _read_settings(folder: Path) -> Tensors:
    read_lingua(folder)
    return {}


def _read_hf(folder: Path) -> Tensors:
    return read_hf(folder).weights


CASES: dict[str, tuple[Callable, Callable, str, int | None, int]] = {
    "dcp-list": (_dcp, _read_dcp, ".metadata", None, 500),
    "dcp-tensors": (_dcp, _read_dcp, "__0_0.distcp", None, 500),
    "lingua-params": (_lingua, _read_settings, "params.json", None, 100),
    "lingua-position": (_lingua, _read_settings, "train_state_00000.json", None, 30),
    "lingua-consolidated": (_consolidated, _read_lingua, "consolidated.pth", None, 300),
    "hf-config": (_hf, _read_hf, "config.json", None, 300),
    # What comes behind a header are numbers: any are a model.
    "hf-header": (_hf, _read_hf, "model.safetensors", 3000, 300),
    "hf-index": (_shards, _read_hf, "model.safetensors.index.json", None, 200),
    "hf-pickle": (_pickled, _read_hf, "pytorch_model.bin", 4000, 300),
}
"""How to make a sound one, the function to read it with, the file to damage, how much of its
beginning (None: all), and how often."""


def _mutated(content: bytes, head: int | None, choose: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 8))):
        place = choose.randrange(min(len(data), head or len(data)))
        kind = choose.randrange(5)
        if kind == 0:
            data[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            data[place] = choose.choice((0, 0xFF, 0x7F, 0x80, choose.randrange(256)))
        elif kind == 2:
            del data[place : place + choose.choice((1, 4, 100))]
        elif kind == 3:
            data[place:place] = choose.choice(_TEXT)
        else:
            text = choose.choice(_TEXT)
            data[place : place + len(text)] = text
        if not data:
            break
    return bytes(data if choose.random() < 0.9 else data[: choose.randrange(len(data) + 1)])


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
    make, read, name, head, times = CASES[case]
    folder = tmp_path / "checkpoint"
    make(folder)
    content, choose = (folder / name).read_bytes(), random.Random(case)
    refused = 0
    for number in range(times):
        (folder / name).write_bytes(_mutated(content, head, choose))
        try:
            for tensor in read(folder).values():
                assert tensor.read().shape == tensor.shape
        except CheckpointError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {number} of {name}: {error!r}") from error
    # Many changes are to what matters, and there the reader must have looked.
    assert refused > times // 10
