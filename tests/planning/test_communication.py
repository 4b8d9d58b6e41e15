"""What ranks send, by arithmetic, against the collectives of real steps.

Equal to the byte, but for single numbers that the estimate leaves out: losses and norms of
gradients.
"""

import collections

import pytest

from megatron_memory.config import Config
from megatron_memory.planning.communication import rank_exchanges
from megatron_memory.planning.groups import groups
from tests.distributed import run_ranks
from tests.planning.counted import Counts, count_all
from tests.planning.test_memory import DISTOPT, FULL, MODERN, OPTIONS, TP2, TP2_SP, VOCAB, _config

OVERLAP = DISTOPT | dict(overlap_grad_reduce=True, overlap_param_gather=True)
MLP = dict(recompute_granularity="selective", recompute_modules=("mlp",))
SCALARS = 24
"""Bytes: the loss, and a norm for each of two optimizers over up to two groups."""

RUNS: dict[int, dict[str, Config]] = {
    2: {
        "TP": _config(parallel=TP2),
        "TP, peer": _config(parallel=TP2, memory={"variant": "peer"}),
        "TP, pkm": _config(parallel=TP2, memory={"variant": "pkm"}),
        "SP": _config(parallel=TP2_SP),
        "SP, all of memory+": _config(parallel=TP2_SP, memory=OPTIONS, bf16=True),
        "SP, pkm": _config(parallel=TP2_SP, memory={"variant": "pkm"}),
        "SP, pkm projected": _config(parallel=TP2_SP, memory={"variant": "pkm", "value_dim": 32}),
        "SP, learned positions": _config(parallel=TP2_SP, model={}),
        "SP, full recompute": _config(
            parallel=TP2_SP, recompute=FULL | dict(recompute_method="uniform")
        ),
        "SP, block recompute": _config(
            parallel=TP2_SP,
            layers=3,
            recompute=FULL | dict(recompute_method="block"),
        ),
        "TP, recompute of MLPs": _config(parallel=TP2, recompute=MLP),
        "query and key norms": _config(parallel=TP2, model=MODERN | dict(qk_layernorm=True)),
        "DP": _config(),
        "DP, distributed optimizer, bf16": _config(parallel=DISTOPT, bf16=True),
        "DP, overlaps": _config(parallel=OVERLAP, bf16=True),
        "DP, dense": _config(parallel=DISTOPT, memory={"layers": None}),
        "M": _config(memory={"parallel_size": 2}),
        "M, peer, recompute of MLPs": _config(
            memory={"parallel_size": 2, "variant": "peer"}, recompute=MLP
        ),
    },
    4: {
        "TP, SP, DP": _config(parallel=TP2_SP | DISTOPT, bf16=True),
        "TP, SP, M": _config(parallel=TP2_SP | DISTOPT, memory={"parallel_size": 2}, bf16=True),
        "TP, SP, M, peer": _config(parallel=TP2_SP, memory={"parallel_size": 2, "variant": "peer"}),
        "DP, M": _config(parallel=OVERLAP, memory={"parallel_size": 2}, batch=8),
    },
}


def _estimate(config: Config, world_size: int, rank: int) -> Counts:
    """By the ranks of each group, as the counts have it."""
    pipeline = config.parallel.pipeline_model_parallel_size
    stage = rank // (world_size // pipeline)
    found, totals = groups(config, world_size), collections.Counter()
    for exchange in rank_exchanges(config, world_size, VOCAB)[stage]:
        group = found[exchange.group]
        block = group.size * group.stride
        first = rank // block * block + rank % group.stride
        members = ",".join(str(first + i * group.stride) for i in range(group.size))
        totals[members, exchange.collective] += exchange.size
    return dict(totals)


def _assert_equal(estimate: Counts, real: Counts, name: str) -> None:
    for key in estimate.keys() | real.keys():
        difference = real.get(key, 0) - estimate.get(key, 0)
        most = SCALARS if key[1] == "all-reduce" else 0
        assert 0 <= difference <= most, (name, key, real.get(key), estimate.get(key))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", RUNS)
def test_ranks_send_what_real_steps_send(world_size: int):
    configs = RUNS[world_size]
    ranks = run_ranks(count_all, world_size, list(configs.values()), VOCAB)
    for rank, counts in enumerate(ranks):
        for (name, config), real in zip(configs.items(), counts, strict=True):
            _assert_equal(_estimate(config, world_size, rank), real, name)
