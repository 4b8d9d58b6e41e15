"""What this rank's optimizer holds of each parameter: its part of main weights and moments."""

from collections.abc import Iterator

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_memory.optimizer.guarded import GuardedOptimizer


def states_by_parameter(
    optimizer: GuardedOptimizer, parameters: list[torch.nn.Parameter]
) -> Iterator[tuple[torch.nn.Parameter, dict[str, Tensor]]]:
    """Tensors by their names in a checkpoint, of those parameters that this rank has any of.

    A distributed optimizer has flat parts of some parameters. Without main weights (fp32) the
    parameter itself is not among them.
    """
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        # Without the distributed optimizer: the tensors themselves that torch's optimizer knows.
        known = {id(p) for group in part.param_groups for p in group["params"]}
        for parameter in parameters:
            main = _main_parameter(part, parameter, known)
            states = {} if main is None else _states(part, parameter, main)
            if states:
                yield parameter, states


def _main_parameter(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, known: set[int]
) -> Tensor | None:
    """What torch's optimizer inside knows the parameter as; None where it does not."""
    if isinstance(optimizer, DistributedOptimizer):
        place = optimizer.model_param_group_index_map.get(parameter)
        if place is None:
            return None
        group, index = place
        return optimizer.optimizer.param_groups[group]["params"][index]
    main = getattr(parameter, "main_param", None)
    return next((p for p in (main, parameter) if p is not None and id(p) in known), None)


def _states(
    optimizer: MegatronOptimizer, parameter: torch.nn.Parameter, main: Tensor
) -> dict[str, Tensor]:
    found = optimizer.optimizer.state.get(main, {})
    states = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    # Transformer Engine's count of steps, which is in the parameter group as well.
    states.pop("step", None)
    return states if main is parameter else {"fp32_param": main, **states}
