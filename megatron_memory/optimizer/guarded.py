"""Megatron's optimizers, asked before each update whether it may take place."""

import math
from collections.abc import Callable

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

MayUpdate = Callable[[bool], bool]
"""Is told whether this rank's gradient norms are finite, and answers alike on all ranks."""


class GuardedOptimizer(ChainedOptimizer):
    """Megatron's chain, whose weights and states stay as they are where a gradient is no number."""

    @torch.no_grad()
    def step(
        self, may_update: MayUpdate = lambda is_finite: is_finite
    ) -> tuple[bool, float | None, int | None]:
        """Clip and update.

        Args:
            may_update: called once, between the norms and the update.

        Returns:
            whether the weights were updated, the gradient norm, and the zeros in all gradients
            (None unless they are counted).
        """
        overflows = self.prepare_grads()
        norms = self._clip_grads()
        is_finite = not overflows and all(math.isfinite(norm) for norm in norms)
        if not may_update(is_finite):
            return False, norms[0], None
        num_zeros = self.count_zeros() if self.config.log_num_zeros_in_grad else None
        return self.step_with_ready_grads(), norms[0], num_zeros

    def _clip_grads(self) -> list[float]:
        """Norms before clipping, the first over all gradients here."""
        grad_norm = self.get_grad_norm()
        for optimizer in self.chained_optimizers:
            _clip_to(optimizer, self.config.clip_grad, grad_norm)
        return [grad_norm]


def _clip_to(optimizer: MegatronOptimizer, max_norm: float, grad_norm: float) -> None:
    parameters = optimizer.get_parameters()
    if max_norm > 0 and parameters:
        clip_grad_by_total_norm_fp32(parameters, max_norm=max_norm, total_norm=grad_norm)


def clip(optimizer: MegatronOptimizer, max_norm: float) -> float:
    """Scale an optimizer's gradients to this norm, if theirs is larger and `max_norm` is not 0.

    Returns:
        their norm before.
    """
    grad_norm = optimizer.get_grad_norm()
    _clip_to(optimizer, max_norm, grad_norm)
    return grad_norm
