"""Seeds: the same run draws the same numbers; ranks share what they must share."""

import random

import numpy as np
import pytest
import torch

from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import (
    initialize_distributed,
    seed_everything,
    seed_step,
    shutdown_distributed,
    world_size,
)
from tests.distributed import run_ranks
from tests.tiny import tiny_config


def _draw() -> dict[str, float]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        own = torch.rand(1).item()
    return {
        "own": own,
        "torch": torch.rand(1).item(),
        "numpy": float(np.random.rand()),
        "python": random.random(),
    }


def test_draws_follow_the_seed():
    initialize_distributed(tiny_config(None), select_backend("cpu"))
    draws = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        draws.append(_draw())
    shutdown_distributed()
    assert draws[0] == draws[1]
    assert all(draws[0][name] != draws[2][name] for name in draws[0])
    assert draws[0]["own"] != draws[0]["torch"]


def _draw_on(parallel: dict) -> dict[str, float]:
    initialize_distributed(tiny_config(None, parallel), select_backend("cpu"))
    return _draw()


@pytest.mark.distributed
@pytest.mark.parametrize("parallel", [{"tensor_model_parallel_size": 2}, {}], ids=["tp2", "dp2"])
def test_tensor_parallel_ranks_differ_in_megatrons_tracker_alone(parallel: dict):
    """Data-parallel ranks share it too: they begin with the same weights."""
    first, second = run_ranks(_draw_on, 2, parallel)
    assert (first.pop("own") == second.pop("own")) is not bool(parallel)
    assert first == second


def _draw_in_steps(parallel: dict) -> list[dict[str, float]]:
    """Of (seed, step) (1, 0), (1, 1), (2, 0), and of the first again."""
    initialize_distributed(tiny_config(None, parallel), select_backend("cpu"))
    draws = []
    for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0)):
        seed_step(seed, step)
        draws.append({name: _draw()[name] for name in ("own", "torch")})
    return draws


@pytest.mark.distributed
def test_steps_and_data_parallel_ranks_draw_their_own():
    """Tensor-parallel ranks share what they compute alike; every other draw is another one."""
    ranks = run_ranks(_draw_in_steps, 4, {"tensor_model_parallel_size": 2})
    (alone,) = run_ranks(_draw_in_steps, 1, {})
    assert all(draws[0] == draws[3] for draws in ranks)
    assert ranks[0] == alone
    for first, second in (ranks[:2], ranks[2:]):
        assert [draw["torch"] for draw in first] == [draw["torch"] for draw in second]
    own = {draw["own"] for draws in ranks for draw in draws[:3]}
    common = {draw["torch"] for draws in ranks[::2] for draw in draws[:3]}
    assert len(own) == 4 * 3 and len(common) == 2 * 3 and not own & common


def test_world_size_is_torchruns(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size() == 8
