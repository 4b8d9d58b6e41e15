"""Slot usage over a log interval: which rows the memory layers read, and how evenly."""

import torch
from megatron.core import parallel_state

from megatron_memory.config.pools import Pool, memory_pools, pool_ranks
from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.memory.usage import SlotUsage, UsageFigures, usage_figures
from megatron_memory.training.setup import TrainingSetup
from megatron_memory.training.wrapping import unwrap


class UsageMeter:
    """Counts the slots that each memory layer reads while it is on. Off to begin with.

    Args:
        setup: of this rank.
    """

    def __init__(self, setup: TrainingSetup):
        self._config, self._device = setup.config, setup.backend.device
        self._layers: dict[int, MemoryLayer] = {}
        self._pools: list[Pool] = []
        if setup.config.memory.enabled and setup.config.memory.log_usage:
            layers = (layer for chunk in setup.model for layer in unwrap(chunk).memory_layers())
            self._layers = {layer.layer_number - 1: layer for layer in layers}
            self._pools = [pool for pool in memory_pools(setup.config) if len(pool.layers) > 1]
        self._counters = {number: self._counter() for number in self._layers}

    def _counter(self) -> SlotUsage:
        return SlotUsage(self._config.memory.num_values, self._device)

    def turn(self, on: bool) -> None:
        """Count from now on, or pause."""
        for number, layer in self._layers.items():
            layer.usage = self._counters[number] if on else None

    def take(self) -> dict[str, UsageFigures]:
        """The figures since the last call, over all ranks, and start again; a collective call.

        Returns:
            by `layer_N`, N counted from 0, and for a table that several layers share, by `pool`, or
            by its name where there are several tables.
        """
        # Without sequence parallelism every tensor-parallel rank counts all tokens; the figures do
        # not change when everything is counted equally often.
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        figures = {f"layer_{n}": counter.figures(group) for n, counter in self._counters.items()}
        for pool in self._pools:
            self._add_pool(pool, figures)
        for counter in self._counters.values():
            counter.weight_sums.zero_()
        return _over_pipeline(figures)

    def _add_pool(self, pool: Pool, figures: dict[str, UsageFigures]) -> None:
        counters = [self._counters[n] for n in pool.layers if n in self._counters]
        is_copied = len(pool_ranks(self._config, pool)) > 1
        if not counters and not is_copied:
            return
        sums = (counters[0] if counters else self._counter()).weight_sums.clone()
        for counter in counters[1:]:
            sums += counter.weight_sums
        if is_copied:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.all_reduce(sums, group=pipeline)
        figures["pool" if pool.name == "shared" else pool.name] = usage_figures(sums)


def _over_pipeline(figures: dict[str, UsageFigures]) -> dict[str, UsageFigures]:
    """Every stage's figures, the layers in the model's order."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() == 1:
        return figures
    stages: list = [None] * pipeline.size()
    torch.distributed.all_gather_object(stages, figures, group=pipeline)
    merged = {name: value for stage in stages for name, value in stage.items()}
    return dict(sorted(merged.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[bool, int, str]:
    is_layer = name.startswith("layer_")
    return (not is_layer, int(name.removeprefix("layer_")) if is_layer else 0, name)
