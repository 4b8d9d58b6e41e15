"""What one of Megatron's optimizers saved is found by another; test_resharding.py runs it."""

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megatron_memory.training.checkpoint.optimizer_kinds import (
    fit_groups,
    read_saved_main_weights,
)

KINDS = {
    "distributed": DistributedOptimizer,
    "bf16": Float16OptimizerWithFloat16Params,
    "fp32": FP32Optimizer,
}
SAVED = {
    "distributed": {"w", "optimizer.state.param.w"},
    "bf16": {"w", "optimizer.state.fp32_param.w"},
    "fp32": {"w"},
}
PREFIXES = {"distributed": "optimizer.state.param.", "bf16": "optimizer.state.fp32_param."}


def _wanted(key: str) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(2))


@pytest.mark.parametrize("ours", PREFIXES)
@pytest.mark.parametrize("theirs", SAVED)
def test_main_weights_are_found_by_their_saved_name(ours: str, theirs: str):
    wanted = {name: _wanted(PREFIXES[ours] + name) for name in ("w", "missing")}
    wanted["moment"] = _wanted("optimizer.state.exp_avg.w")
    read_saved_main_weights({0: wanted}, SAVED[theirs])
    assert wanted["w"].key == PREFIXES.get(theirs, "") + "w"
    assert wanted["missing"].key == PREFIXES[ours] + "missing"  # for the error to name
    assert wanted["moment"].key == "optimizer.state.exp_avg.w"


def _optimizer(*kinds: str) -> ChainedOptimizer:
    chain = object.__new__(ChainedOptimizer)
    chain.chained_optimizers = [object.__new__(KINDS[kind]) for kind in kinds]
    return chain


def _read(ours: str, theirs: str) -> dict:
    """What megatron-core makes of their groups, the first of a rank without parameters in it, and
    of our numbers of the parameters, which the distributed optimizer has not."""
    loaded: dict = {"optimizer": {}} if ours != "fp32" or theirs != "fp32" else {}
    groups: list[dict] = [{"lr": 1.0}, {"lr": 2.0, "step": 7}]
    if ours != "distributed":
        numbers = [{"params": [0]}, {"params": [1, 2]}]
        (loaded if ours == "fp32" else loaded["optimizer"])["param_groups"] = numbers
    place = loaded if theirs == "fp32" else loaded["optimizer"]
    if "param_groups" in place:
        groups = [a | b for a, b in zip(groups, place["param_groups"], strict=True)]
    place["param_groups"] = groups
    return loaded


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_groups_are_where_the_optimizer_looks(ours: str, theirs: str):
    one = fit_groups(_read(ours, theirs), _optimizer(ours))
    both = fit_groups({0: _read(ours, theirs), 1: _read(ours, theirs)}, _optimizer(ours, ours))
    assert both == {0: one, 1: one}
    groups = one["param_groups"] if ours == "fp32" else one["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [1.0, 2.0]
    assert [group["step"] for group in groups] == [7, 7]
    assert [group.get("params") for group in groups] == (
        [None, None] if ours == "distributed" else [[0], [1, 2]]
    )
    assert ("param_state_sharding_type" in one) == (ours == "distributed")
