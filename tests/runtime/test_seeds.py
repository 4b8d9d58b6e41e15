"""Seeds: the same run draws the same numbers; ranks share what they must share."""

import random

import numpy as np
import pytest
import torch

from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import (
    initialize_distributed,
    seed_everything,
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
    """Data-parallel ranks share it too, as in Megatron-LM: their tokens differ anyway."""
    first, second = run_ranks(_draw_on, 2, parallel)
    assert (first.pop("own") == second.pop("own")) is not bool(parallel)
    assert first == second


def test_world_size_is_torchruns(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert world_size() == 8
