"""Two optimizers in a chain, each with its own gradient norm and clip: all other parameters, and
the values."""

from typing import Any

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_memory.optimizer.guarded import GuardedOptimizer, clip
from megatron_memory.optimizer.sharded_values import sharded_value_states, without_tensors


class MemoryOptimizer(GuardedOptimizer):
    """Megatron's chain of the dense and the value optimizer, without a common gradient norm.

    Megatron clips a chain by the norm over all of it; the paper clips the values by theirs alone.

    Args:
        dense: optimizer of everything but the value tables.
        values: optimizer of the value tables.
        value_clip_grad: largest norm of the values' gradient; 0 does not clip.
    """

    def __init__(
        self, dense: MegatronOptimizer, values: MegatronOptimizer, *, value_clip_grad: float
    ):
        super().__init__([dense, values])
        self.value_clip_grad = value_clip_grad
        self.value_grad_norm: float | None = None
        """Norm of the values' gradient in the last step, before clipping."""

    def _clip_grads(self) -> list[float]:
        dense, values = self.chained_optimizers
        grad_norm = clip(dense, self.config.clip_grad)
        self.value_grad_norm = clip(values, self.value_clip_grad)
        return [grad_norm, self.value_grad_norm]

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs
    ) -> dict[int, dict[str, Any]]:
        """Megatron's, but for the values of a distributed optimizer: see `sharded_values`."""
        dense, values = self.chained_optimizers
        if not isinstance(values, DistributedOptimizer):
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        self._synchronize_steps()
        return {
            0: dense.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs),
            1: sharded_value_states(values, model_sharded_state_dict, is_loading=is_loading),
        }

    def load_state_dict(self, state_dict: dict[int, dict[str, Any]]) -> None:
        """Load what a checkpoint's tensors were read into by `sharded_state_dict`."""
        if isinstance(self.chained_optimizers[1], DistributedOptimizer):
            state_dict = {**state_dict, 1: without_tensors(state_dict[1])}
        super().load_state_dict(state_dict)
