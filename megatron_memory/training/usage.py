"""Slot usage over a log interval: which rows the memory layers read, and how evenly."""

import torch
from megatron.core import parallel_state

from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.memory.usage import SlotUsage, UsageFigures, usage_figures
from megatron_memory.training.setup import TrainingSetup, unwrap


class UsageMeter:
    """Counts the slots that each memory layer reads while it is on. Off to begin with.

    Args:
        setup: of this rank.
    """

    def __init__(self, setup: TrainingSetup):
        self._layers: list[MemoryLayer] = []
        if setup.config.memory.enabled and setup.config.memory.log_usage:
            self._layers = [
                layer for chunk in setup.model for layer in unwrap(chunk).memory_layers()
            ]
        self._counters = [
            SlotUsage(setup.config.memory.num_values, setup.backend.device) for _ in self._layers
        ]
        self._has_pool = setup.config.memory.share_scope == "model" and len(self._layers) > 1

    def turn(self, on: bool) -> None:
        """Count from now on, or pause."""
        for layer, counter in zip(self._layers, self._counters, strict=True):
            layer.usage = counter if on else None

    def take(self) -> dict[str, UsageFigures]:
        """The figures since the last call, over all ranks, and start again; a collective call.

        Returns:
            by `layer_N`, N counted from 0, and `pool` for a table that several layers share.
        """
        # Without sequence parallelism every tensor-parallel rank counts all tokens; the figures do
        # not change when everything is counted equally often.
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        figures = {}
        for layer, counter in zip(self._layers, self._counters, strict=True):
            figures[f"layer_{layer.layer_number - 1}"] = counter.figures(group)
        if self._has_pool:
            sums = torch.stack([counter.weight_sums for counter in self._counters])
            figures["pool"] = usage_figures(sums.sum(dim=0))
        for counter in self._counters:
            counter.weight_sums.zero_()
        return figures
