"""Checkpoints hold how much each slot was read since the training began, for any layout."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.conversion.megatron import read_megatron
from megatron_memory.memory.usage import SlotUsage, usage_key
from tests.distributed import run_ranks
from tests.training.tiny_runs import BATCH, SEQUENCE, change, run, tiny_config

SLOTS, HEADS, STOP, END = 64, 2, 4, 6
TP2 = {"tensor_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2-sp": TP2 | {"sequence_parallel": True},
}
"""For others tests/training/checkpoint/test_resharding.py looks at what is loaded."""


def _config(dataset: str, save: Path, **checkpoint: Any) -> Config:
    memory = dict(layers="0,1", num_heads=HEADS, top_k=4, num_half_keys=8, share_scope="layer")
    config = tiny_config(dataset, memory=memory)
    # Not a divisor of STOP: what was counted since the last report is saved as well.
    config = change(config, "logging", log_interval=3)
    return change(config, "checkpoint", save=str(save), **checkpoint)


def _until(config: Config, iteration: int) -> Config:
    return change(config, "training", exit_interval=iteration)


@dataclasses.dataclass
class Counted:
    losses: list[float]
    sums: dict[int, torch.Tensor]
    """What each layer read in training, summed in fp64 beside the program's own counters."""


def _run_and_count(config: Config) -> Counted:
    sums: dict[int, torch.Tensor] = {}
    record = SlotUsage.record

    def record_twice(self, route):
        mine = sums.setdefault(len(sums) if id(self) not in seen else seen[id(self)], _zeros())
        seen.setdefault(id(self), len(seen))
        mine.index_add_(0, route.indices.flatten().long(), route.weights.flatten().double())
        record(self, route)

    seen: dict[int, int] = {}
    SlotUsage.record = record_twice
    try:
        return Counted(losses=run(config).losses, sums=sums)
    finally:
        SlotUsage.record = record


def _zeros() -> torch.Tensor:
    return torch.zeros(SLOTS, dtype=torch.float64)


def _runs(configs: list[Config]) -> list[Counted]:
    return [_run_and_count(config) for config in configs]


def _saved(folder: Path) -> tuple[dict[int, torch.Tensor], int | None]:
    state = read_megatron(folder)
    sums = {layer: state.usage[usage_key(layer)].read() for layer in (0, 1) if state.usage}
    return sums, state.common.get("usage_since_sample")


@pytest.fixture(scope="module")
def undisturbed(dataset: str, tmp_path_factory: pytest.TempPathFactory):
    """One rank: STOP iterations, on to END from there, STOP uncounted, and on with counting."""
    root = tmp_path_factory.mktemp("usage")
    first = _until(_config(dataset, root / "first"), STOP)
    rest = _until(_config(dataset, root / "rest", load=str(root / "first")), END)
    uncounted = change(first, "memory", log_usage=False)
    uncounted = change(uncounted, "checkpoint", save=str(root / "uncounted"))
    late = _until(_config(dataset, root / "late", load=str(root / "uncounted")), END)
    return root, run_ranks(_runs, 1, [first, rest, uncounted, late])[0]


def test_what_is_saved_was_read(undisturbed):
    root, (first, rest, _, _) = undisturbed
    sums, since = _saved(root / "first")
    assert since == 0
    for layer in (0, 1):
        # fp32 sums between reports.
        torch.testing.assert_close(sums[layer], first.sums[layer], rtol=1e-5, atol=1e-6)
        # A head's weights add up to 1.
        assert sums[layer].sum().item() == pytest.approx(STOP * BATCH * SEQUENCE * HEADS, rel=1e-5)
    resumed, since = _saved(root / "rest")
    assert since == 0
    for layer in (0, 1):
        expected = first.sums[layer] + rest.sums[layer]
        torch.testing.assert_close(resumed[layer], expected, rtol=1e-5, atol=1e-6)


def test_counting_changes_no_loss_and_may_begin_late(undisturbed):
    root, (first, rest, uncounted, late) = undisturbed
    assert uncounted.losses == first.losses and late.losses == rest.losses
    assert _saved(root / "uncounted") == ({}, None)
    sums, since = _saved(root / "late")
    assert since == STOP * BATCH
    for layer in (0, 1):
        torch.testing.assert_close(sums[layer], late.sums[layer], rtol=1e-5, atol=1e-6)


def test_other_layouts_go_on_counting(undisturbed, dataset: str, tmp_path: Path):
    root, _ = undisturbed
    expected, _ = _saved(root / "rest")
    configs = []
    for name, parallel in LAYOUTS.items():
        config = _config(dataset, tmp_path / name, load=str(root / "first"))
        configs.append(_until(change(config, "parallel", **parallel), END))
    run_ranks(_runs, 2, configs)
    for name in LAYOUTS:
        sums, since = _saved(tmp_path / name)
        assert since == 0
        for layer in (0, 1):
            assert sums[layer].sum().item() == pytest.approx(expected[layer].sum().item(), rel=1e-5)
            # Scores in another order of summation move weights between slots by their rounding.
            torch.testing.assert_close(sums[layer], expected[layer], rtol=0, atol=0.05, msg=name)
