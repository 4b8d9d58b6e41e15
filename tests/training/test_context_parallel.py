"""Context parallelism equals one rank: the memory layer on its part of the sequences, and whole
trainings with a stand-in for Transformer Engine's attention (tests/parallel/context_attention.py).

Tolerances as in tests/training/test_parity_one_rank.py.
"""

import pytest

from megatron_memory.config import Config
from tests.distributed import run_ranks
from tests.parallel.context_attention import use_gathered_attention
from tests.parallel.runs import assert_equal_runs, train
from tests.tiny import tiny_config

CP2 = {"context_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
LAYOUTS = {
    "cp2": (2, 1, CP2),
    "cp2-m2": (2, 2, CP2),
    "tp2-sp-cp2": (4, 1, CP2 | TP2_SP),
    "cp2-dp2-overlap": (4, 1, CP2 | OVERLAP),
    "cp2-dp2-m2-overlap": (4, 2, CP2 | OVERLAP),
    "cp2-dp2-m4": (4, 4, CP2),
}
"""Ranks, M, and flags."""


def train_in_contexts(config: Config) -> dict:
    use_gathered_attention()
    return train(config)


_one_rank_runs: dict[str, dict] = {}


def one_rank(variant: str) -> dict:
    """The run on one rank, with megatron-core's own attention; computed once."""
    if variant not in _one_rank_runs:
        _one_rank_runs[variant] = run_ranks(train, 1, tiny_config(variant))[0]
    return _one_rank_runs[variant]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("variant", "layout"),
    [("memory+", layout) for layout in LAYOUTS] + [("peer", "cp2-m2"), ("pkm", "tp2-sp-cp2")],
)
def test_layout_equals_one_rank(variant: str, layout: str):
    world_size, neighbours, parallel = LAYOUTS[layout]
    config = tiny_config(variant, parallel, memory={"parallel_size": neighbours})
    assert_equal_runs(run_ranks(train_in_contexts, world_size, config), one_rank(variant))
