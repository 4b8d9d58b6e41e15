"""What ranks send, by arithmetic, against the collectives of real steps.

Equal to the byte, but for single numbers that the estimate leaves out: losses and norms of
gradients.
"""

import collections

import pytest

from megatron_memory.config import Config
from megatron_memory.planning.communication import rank_exchanges
from megatron_memory.planning.groups import Group
from tests.distributed import run_ranks
from tests.planning.counted import Counts, count_all
from tests.planning.test_memory import (
    BESIDE,
    DISTOPT,
    FULL,
    MLPS_AND_SUMS,
    MODERN,
    OPTIONS,
    PP2,
    REPLICAS,
    SUMS,
    TP2,
    TP2_SP,
    UNTIED,
    VOCAB,
    VPP2,
    _config,
)

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
        "SP, recompute of sums": _config(parallel=TP2_SP, recompute=SUMS),
        "SP, recompute of MLPs and sums": _config(parallel=TP2_SP, recompute=MLPS_AND_SUMS),
        "SP, beside the MLP, recompute of MLPs": _config(
            parallel=TP2_SP, memory=BESIDE, recompute=MLP
        ),
        "TP, beside the MLP, recompute of both": _config(
            parallel=TP2, memory=BESIDE, recompute=MLPS_AND_SUMS
        ),
        "M, recompute of sums": _config(memory={"parallel_size": 2}, recompute=SUMS),
        "PP": _config(parallel=PP2, layers=4, bf16=True),
        "PP, own output layer": _config(parallel=PP2, layers=4, model=MODERN | UNTIED),
        "VPP": _config(parallel=VPP2, layers=4, batch=8, bf16=True),
        "VPP, copies of the table": _config(parallel=VPP2, layers=4, batch=8, memory=REPLICAS),
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
        "PP, DP, copies of the table": _config(
            parallel=PP2 | DISTOPT, layers=4, batch=8, memory=REPLICAS, bf16=True
        ),
        "PP, TP, SP": _config(parallel=PP2 | TP2_SP, layers=4),
        "DP, M": _config(parallel=OVERLAP, memory={"parallel_size": 2}, batch=8),
    },
}


def _members(group: Group, rank: int, ranks_per_stage: int) -> str:
    """The group's ranks, of which `rank` is one."""
    if group.pipeline_ranks:
        ranks = [stage * ranks_per_stage + rank % ranks_per_stage for stage in group.pipeline_ranks]
    else:
        first = rank // (group.size * group.stride) * group.size * group.stride
        ranks = [first + rank % group.stride + i * group.stride for i in range(group.size)]
    return ",".join(map(str, ranks))


def _estimate(config: Config, world_size: int, rank: int) -> Counts:
    """By the ranks of each group, as the counts have it."""
    ranks_per_stage = world_size // config.parallel.pipeline_model_parallel_size
    totals: collections.Counter[tuple[str, str]] = collections.Counter()
    for exchange in rank_exchanges(config, world_size, VOCAB)[rank // ranks_per_stage]:
        members = _members(exchange.group, rank, ranks_per_stage)
        totals[members, exchange.collective] += exchange.size
    return dict(totals)


def _assert_equal(estimate: Counts, real: Counts, name: str) -> None:
    for key in estimate.keys() | real.keys():
        difference = real.get(key, 0) - estimate.get(key, 0)
        most = SCALARS if key[1] in ("all-reduce", "broadcast") else 0
        assert 0 <= difference <= most, (name, key, real.get(key), estimate.get(key))


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", RUNS)
def test_ranks_send_what_real_steps_send(world_size: int):
    configs = RUNS[world_size]
    ranks = run_ranks(count_all, world_size, list(configs.values()), VOCAB)
    for rank, counts in enumerate(ranks):
        for (name, config), real in zip(configs.items(), counts, strict=True):
            _assert_equal(_estimate(config, world_size, rank), real, name)
