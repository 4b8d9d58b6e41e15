"""A checkpoint that one of Megatron's optimizers wrote, for another one to read.

They differ with `--use-distributed-optimizer` and `--bf16`, and so does what they save:

| optimizer | fp32 main weights of X | parameter groups |
|---|---|---|
| distributed | `optimizer.state.param.X` | in `optimizer` |
| bf16, not distributed | `optimizer.state.fp32_param.X` | in `optimizer` |
| fp32, not distributed | X itself | at the top |

The moments have one name.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer

_MAIN_WEIGHTS = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")


def read_saved_main_weights(wanted: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """Ask for the main weights by the name that they have in the checkpoint.

    Args:
        wanted: the optimizer's sharded state dict, whose keys are changed.
        saved: the names of the checkpoint's tensors.
    """
    for tensor in nested_values(wanted):
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory) and tensor.key not in saved:
            tensor.key = _saved_name(tensor.key, saved)


def _saved_name(key: str, saved: Mapping[str, Any]) -> str:
    for prefix in _MAIN_WEIGHTS[:2]:
        if key.startswith(prefix):
            weight = key.removeprefix(prefix)
            names = [other + weight for other in _MAIN_WEIGHTS if other + weight in saved]
            return names[0] if names else key
    return key


def fit_groups(
    loaded: dict[Any, Any], optimizer: ChainedOptimizer, step: int | None = None
) -> dict[Any, Any]:
    """A loaded state dict with the parameter groups where this run's optimizers look for them.

    Args:
        loaded: the optimizer's part of what megatron-core has read: plain values as they were
            saved, tensors as they were wanted.
        optimizer: of this run.
        step: updates that made the states, where the checkpoint has states without groups; those
            of this run are then taken.
    """
    parts = optimizer.chained_optimizers
    if len(parts) == 1:
        return _fit_groups_of_one(loaded, parts[0], step)
    return {i: _fit_groups_of_one(loaded[i], part, step) for i, part in enumerate(parts)}


def _fit_groups_of_one(
    loaded: dict[str, Any], optimizer: MegatronOptimizer, step: int | None
) -> dict[str, Any]:
    inner = dict(loaded.get("optimizer", {}))
    lists = [part.get("param_groups") for part in (loaded, inner)]
    if step is not None:
        own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        lists.append([group | {"step": step} for group in own])
    # One has what was saved, the other this run's numbers of its parameters; or one has both.
    halves = [groups for groups in lists if groups is not None]
    groups = [
        {name: value for group in of_both for name, value in group.items()}
        for of_both in zip(*halves, strict=True)
    ]
    _tell_steps(groups)
    fitted = {name: value for name, value in loaded.items() if name != "param_groups"}
    # A pipeline rank without values has no states of them: nothing was read for it.
    if isinstance(optimizer, FP32Optimizer):
        return {"state": {}, **fitted, "param_groups": groups}
    if isinstance(optimizer, DistributedOptimizer):
        fitted["param_state_sharding_type"] = "fully_reshardable"
    else:
        fitted.setdefault("fp32_from_fp16_params", [[] for _ in groups])
    return {**fitted, "optimizer": {"state": {}, **inner, "param_groups": groups}}


def _tell_steps(groups: list[dict[str, Any]]) -> None:
    """All groups have taken equally many steps; but the saving rank may have had no parameters in
    some, and then some kinds of Adam do not count."""
    steps = [group["step"] for group in groups if group.get("step") is not None]
    for group in groups if steps else ():
        group["step"] = steps[0]
