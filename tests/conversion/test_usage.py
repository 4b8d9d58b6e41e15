"""Counts of slots read: kept between our own checkpoints, left out elsewhere, said."""

from pathlib import Path

import pytest
import torch

from megatron_memory.conversion.convert import convert
from megatron_memory.conversion.growth.half_keys import HalfKeyGrowth, grow_half_keys
from megatron_memory.conversion.megatron import read_megatron
from megatron_memory.conversion.verify import check_read_back
from megatron_memory.exceptions import CheckpointError
from tests.conversion.states import assert_same_tensors, conversion, read_all
from tests.inspection.saved import save, tiny_state
from tests.tiny import one_rank  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_rank")


def test_counts_of_slots_read(tmp_path: Path):
    state = tiny_state()
    folder = save(state, "megatron", tmp_path / "saved")
    convert(conversion("megatron", folder, "megatron", tmp_path / "tp2"), print)
    back = read_megatron(tmp_path / "tp2")
    assert_same_tensors(read_all(back.usage), read_all(state.usage))
    assert back.common["usage_since_sample"] == 8
    assert not any(name.startswith("memory_usage") for name in back.weights)
    with pytest.raises(CheckpointError, match=r"counts.*memory_usage"):
        lost = read_megatron(save(state.without_optimizer(), "megatron", tmp_path / "lost"))
        assert "usage_since_sample" not in lost.common
        check_read_back(state, "megatron", tmp_path / "lost", torch.float32)
    said: list[str] = []
    convert(conversion("megatron", folder, "lingua", tmp_path / "lingua"), said.append)
    assert any("counts of slots read" in line for line in said)

    growth = HalfKeyGrowth(half_keys=16, method="kept", key_noise=0, new_key_scale=0.5, seed=1)
    grown = grow_half_keys(state, growth)
    assert state.usage and not grown.usage
