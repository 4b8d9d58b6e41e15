"""Stop and go on: to the last bit on the same layout, and within fp32 rounding where the columns
move; tests/training/checkpoint/test_resharding.py has other layouts."""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.full_tensors import assemble
from tests.training.tiny_runs import Run, change, runs, tiny_config

DROPOUT = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
LAYOUTS = {
    "tp2": (2, {"parallel": {"tensor_model_parallel_size": 2}, "model": DROPOUT}),
    "tp2-sp-random-values": (
        2,
        {
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            "model": DROPOUT,
            "memory": {"layers": "0,1", "num_heads": 2, "top_k": 4, "num_half_keys": 8}
            | {"num_random_values": 2, "query_dropout": 0.1, "value_dropout": 0.1},
        },
    ),
    "dp2-distopt-overlap": (
        2,
        {
            "parallel": {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            "model": DROPOUT,
        },
    ),
    "pp2-interleaved": (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "use_distributed_optimizer": True,
            },
            "model": DROPOUT | {"num_layers": 4},
            "memory": {"layers": "1,3", "num_heads": 2, "top_k": 4, "num_half_keys": 8}
            | {"num_random_values": 2, "value_dropout": 0.1},
        },
    ),
    "dp2-memory-parallel": (
        2,
        {
            "parallel": {"use_distributed_optimizer": True},
            "model": DROPOUT,
            "memory": {"layers": "0,1", "num_heads": 2, "top_k": 4, "num_half_keys": 8}
            | {"parallel_size": 2, "value_dim": 64, "num_random_values": 2, "value_dropout": 0.1},
        },
    ),
    "bf16-peer": (
        1,
        {
            "memory": {"variant": "peer", "layers": "1", "num_heads": 2, "top_k": 4}
            | {"num_half_keys": 8},
            "model": DROPOUT,
        },
    ),
    "sgd": (1, {"optimizer": {"optimizer": "sgd", "lr": 0.1, "lr_decay_iters": 20}}),
    "dense": (1, {"memory": {}, "model": DROPOUT}),
}


def _configs(dataset: str, folder: Path, settings: dict) -> list:
    """20 iterations; 10 iterations; the other 10."""
    from megatron_memory.config import PrecisionConfig

    precision = PrecisionConfig(bf16="peer" in folder.name)
    whole = tiny_config(dataset, **settings, precision=precision)
    if settings.get("memory") == {}:
        whole = change(whole, "memory", layers=None)
    save = str(folder / "checkpoints")
    half = change(change(whole, "checkpoint", save=save), "training", exit_interval=10)
    rest = change(whole, "checkpoint", load=save)
    return [whole, half, rest]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_exact_on_the_same_layout(layout: str, dataset: str, tmp_path: Path):
    world_size, settings = LAYOUTS[layout]
    folder = tmp_path / layout
    configs = _configs(dataset, folder, settings)
    for whole, half, rest in run_ranks(runs, world_size, configs):
        assert half.iterations == list(range(1, 11)) and rest.iterations == list(range(11, 21))
        assert half.losses + rest.losses == whole.losses
        assert half.norms + rest.norms == whole.norms
        assert half.learning_rates + rest.learning_rates == whole.learning_rates
        _assert_same_bits(whole, rest)
        assert whole.losses[-1] < whole.losses[0]


def _assert_same_bits(one: Run, other: Run) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, pieces in one.weights.items():
        for (_, _, a), (_, _, b) in zip(pieces, other.weights[name], strict=True):
            assert torch.equal(a, b), name


DISTOPT = {"use_distributed_optimizer": True}
OVERLAP = DISTOPT | {"overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2}
MEMORY_PARALLEL = {
    "plain": (2, [({}, 2), (TP2 | {"sequence_parallel": True}, 1), ({}, 2)]),
    "distopt": (2, [(OVERLAP, 2), (TP2 | DISTOPT, 1), (OVERLAP, 2)]),
    "distopt-four-ranks": (4, [(DISTOPT, 2), (TP2 | OVERLAP, 2), (DISTOPT, 4)]),
}
"""Ranks, then flags and M of three parts of a run."""


@pytest.mark.parametrize("case", MEMORY_PARALLEL)
def test_resume_with_the_columns_on_other_ranks(case: str, dataset: str, tmp_path: Path):
    """From data-parallel neighbours to tensor-parallel ranks and back, states included."""
    world_size, layouts = MEMORY_PARALLEL[case]
    optimizer = dict(lr=1e-2, lr_decay_iters=20, adam_eps=1e-4)
    memory = dict(layers="0,1", num_heads=2, top_k=4, num_half_keys=8, value_dim=128)
    plain = tiny_config(dataset, optimizer=optimizer, memory=memory)
    save = str(tmp_path / "checkpoints")
    parts = []
    for number, (parallel, parallel_size) in enumerate(layouts):
        part = change(change(plain, "parallel", **parallel), "memory", parallel_size=parallel_size)
        part = change(part, "training", exit_interval=3 * number + 3)
        parts.append(change(part, "checkpoint", save=save, load=save if number else None))
    (reference,) = run_ranks(runs, 1, [change(plain, "training", exit_interval=9)])[0]
    ranks = run_ranks(runs, world_size, parts)
    for seen in ranks:
        assert [part.iterations for part in seen] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
        losses = [loss for part in seen for loss in part.losses]
        assert losses == pytest.approx(reference.losses, abs=2e-5)
    ours = assemble([seen[-1].weights for seen in ranks])
    for name, tensor in assemble([reference.weights]).items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=2e-5)
