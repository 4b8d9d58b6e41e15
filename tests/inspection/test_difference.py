"""Differences of checkpoints, by hand and over the formats."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_memory.conversion import lazy
from megatron_memory.conversion.lazy import from_memory, made_of
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.inspection import difference as difference_module
from megatron_memory.inspection.difference import TensorDifference, compare_tensors
from tests.conversion.states import save_hf_model
from tests.inspection.saved import changed, save, tiny_state
from tests.tiny import one_rank  # noqa: F401
from tools import inspect_checkpoint


def _compare(one: Tensor, another: Tensor, name: str = "weight") -> TensorDifference:
    return compare_tensors(name, from_memory(one), from_memory(another))


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(difference_module, "_SLICE", 48)


@pytest.mark.usefixtures("_small_blocks")
def test_figures():
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(60, 9, generator=generator)
    another = one.clone()
    another[3, 4] += 0.5
    another[[7, 59], :] *= -1
    found = _compare(one, another, "memory.shared.values.weight")
    exact = (one.double() - another.double()).norm() / one.double().norm()
    assert found.relative_norm == pytest.approx(exact.item(), rel=1e-12)
    assert found.largest == (one.double() - another.double()).abs().max().item()
    assert found.share_changed == 19 / 540
    assert found.share_of_rows_changed == 3 / 60
    assert _compare(one, another).share_of_rows_changed is None
    # A tensor that is made as a whole is made once: beside what finds its shape.
    calls = []
    made = made_of([from_memory(another)], lambda tensors: calls.append(1) or tensors[0])
    assert compare_tensors("weight", from_memory(one), made) == _compare(one, another)
    assert len(calls) == 2


def test_numbers_of_other_types_and_what_is_no_number():
    one = torch.tensor([1.0, 2.0, math.nan, math.inf, 0.0])
    assert not _compare(one, one.bfloat16()).share_changed
    other = torch.tensor([1.0, 2.0, math.nan, -math.inf, -0.0])
    found = _compare(one, other)
    assert (found.share_changed, found.largest, found.relative_norm) == (1 / 5, math.inf, math.inf)
    assert _compare(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 1.0])).share_changed == 0.5
    zero = _compare(torch.zeros(3), torch.ones(3))
    assert (zero.relative_norm, zero.largest) == (math.inf, 1.0)


@pytest.fixture(scope="module")
def state(one_rank) -> SavedState:  # noqa: F811
    return tiny_state()


@pytest.fixture(scope="module")
def folder(state: SavedState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(state, "megatron", tmp_path_factory.mktemp("saved") / "megatron")


def _diff(capsys, *argv: object) -> tuple[int, dict]:
    code = inspect_checkpoint.main([*map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_what_changed_largest_first(state: SavedState, folder: Path, tmp_path: Path, capsys):
    table = state.weights["memory.shared.values.weight"].read().clone()
    table[:16] += 1
    norm = state.weights["decoder.final_layernorm.weight"].read() * 1.001
    memory = dataclasses.replace(state.config.memory, top_k=3)
    other = changed(state, memory_shared_values_weight=table, decoder_final_layernorm_weight=norm)
    config = dataclasses.replace(state.config, memory=memory)
    other = dataclasses.replace(other.without_optimizer(), config=config)
    code, found = _diff(capsys, folder, "--diff", save(other, "megatron", tmp_path / "other"))
    assert code == 1 and not found["is_none"]
    names = [tensor["name"] for tensor in found["changed"]]
    assert names == ["memory.shared.values.weight", "decoder.final_layernorm.weight"]
    assert found["changed"][0]["share_of_rows_changed"] == 16 / 64
    assert found["changed"][0]["share_changed"] == 16 / 64
    assert found["changed"][1]["relative_norm"] == pytest.approx(1e-3, rel=1e-3)
    # Two moments of each, and the counts of two layers.
    assert len(found["only_first"]) == 2 * len(state.weights) + 2 and not found["only_second"]
    assert found["num_equal"] == len(state.weights) - 2
    of_model = [setting for setting in found["settings"] if setting["is_of_model"]]
    assert of_model == [{"key": "memory_top_k", "first": 4, "second": 3, "is_of_model": True}]


def test_text_and_what_only_the_settings_say(state, folder: Path, tmp_path: Path, capsys):
    memory = dataclasses.replace(state.config.memory, layers="centered:2:2", value_lr=0.5)
    config = dataclasses.replace(state.config, memory=memory)
    other = save(dataclasses.replace(state, config=config), "megatron", tmp_path / "other")
    # The same layers in other words, and a setting of the training: the same model.
    code = inspect_checkpoint.main(["--diff", str(folder), str(other)])
    text = capsys.readouterr().out
    assert code == 0
    assert "run: --memory-value-lr 0.001 | --memory-value-lr 0.5" in text
    assert "memory-layers" not in text and f"{3 * len(state.weights) + 2} tensors have the" in text
    model = dataclasses.replace(state.config.model, rotary_base=500)
    config = dataclasses.replace(state.config, model=model)
    other = save(dataclasses.replace(state, config=config), "megatron", tmp_path / "base")
    code = inspect_checkpoint.main(["--diff", str(folder), str(other)])
    assert code == 1 and "model: --rotary-base 10000 | --rotary-base 500" in capsys.readouterr().out


def test_formats_and_types(state: SavedState, folder: Path, tmp_path: Path, capsys):
    config = dataclasses.replace(state.config.model, rotary_interleaved=True)
    adjacent = dataclasses.replace(
        state, config=dataclasses.replace(state.config, model=config)
    ).without_optimizer()
    megatron = save(adjacent, "megatron", tmp_path / "adjacent")
    lingua = save(adjacent, "lingua", tmp_path / "lingua")
    code, found = _diff(capsys, megatron, "--diff", lingua)
    assert code == 0 and found["num_equal"] == len(state.weights)
    small = {name: tensor.to(torch.bfloat16) for name, tensor in adjacent.weights.items()}
    rounded = dataclasses.replace(adjacent, weights=small)
    code, found = _diff(capsys, megatron, "--diff", save(rounded, "megatron", tmp_path / "bf16"))
    assert code == 1
    assert set(map(tuple, found["retyped"].values())) == {("fp32", "bf16")}
    assert all(tensor["relative_norm"] < 2**-8 for tensor in found["changed"])


def test_one_that_is_no_model_is_compared_by_names_of_files(folder: Path, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "iter_0000007" / "config.yaml").unlink()
    code, found = _diff(capsys, folder, "--diff", tmp_path / "copy")
    assert code == 0 and found["num_equal"] and not found["settings"]
    stored = next((tmp_path / "copy").glob("*/*.distcp"))
    stored.write_bytes(stored.read_bytes()[:-2000])
    code, found = _diff(capsys, folder, "--diff", tmp_path / "copy")
    assert code == 1 and found["unreadable"]


def test_one_whose_configuration_is_of_another_model_is_not_equal(tmp_path, capsys):
    save_hf_model("llama", tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"vocab_size": values["vocab_size"] - 1}))
    code, found = _diff(capsys, tmp_path / "one", "--diff", tmp_path / "other")
    assert code == 1 and found["num_equal"] and not found["changed"]
    (problem,) = found["unreadable"]
    assert problem.startswith(f"{tmp_path / 'other'}: it cannot be read as a model")
