"""Slot usage: which rows the memory layers read, and how evenly, over a log interval and since the
counting began."""

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.config.pools import Pool, memory_pools, pool_ranks
from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.memory.usage import SlotUsage, UsageFigures, usage_figures, usage_key
from megatron_memory.training.wrapping import unwrap


class UsageMeter:
    """Counts the slots that each memory layer reads while it is on. Off to begin with.

    A layer's sums since the counting began are shared out over the ranks that read with it: each
    slot's is on one of them, in fp64, for in fp32 they would soon stop growing.

    Args:
        config: of the run.
        device: of this rank.
        model: its chunks here.
    """

    def __init__(self, config: Config, device: torch.device, model: list[DistributedDataParallel]):
        self._config, self._device = config, device
        self._layers: dict[int, MemoryLayer] = {}
        self._pools: list[Pool] = []
        if config.memory.enabled and config.memory.log_usage:
            layers = (layer for chunk in model for layer in unwrap(chunk).memory_layers())
            self._layers = {layer.layer_number - 1: layer for layer in layers}
            self._pools = [pool for pool in memory_pools(config) if len(pool.layers) > 1]
        self._counters: dict[int, SlotUsage] = {}
        self._totals: dict[int, Tensor] = {}
        """Of this rank's slots; without what the counters hold."""
        self.first_sample = 0
        """Sequences of the training data that had been used when the counting began."""

    @property
    def is_on(self) -> bool:
        """Whether the run counts at all, on any rank."""
        return self._config.memory.enabled and self._config.memory.log_usage

    def _prepare(self) -> None:
        """Not at the beginning, for a model is built in other places than trainings, too."""
        if self._layers and not self._counters:
            begin, end = self._own_slots()
            self._counters = {number: self._counter() for number in self._layers}
            self._totals = {
                number: torch.zeros(end - begin, dtype=torch.float64, device=self._device)
                for number in self._layers
            }

    def _counter(self) -> SlotUsage:
        return SlotUsage(self._config.memory.num_values, self._device)

    def turn(self, on: bool) -> None:
        """Count from now on, or pause."""
        self._prepare()
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
        group = _readers()
        figures = {f"layer_{n}": counter.figures(group) for n, counter in self._counters.items()}
        for number, counter in self._counters.items():
            self._totals[number] += self._own_part(counter.weight_sums)
        for pool in self._pools:
            self._add_pool(pool, figures)
        for counter in self._counters.values():
            counter.weight_sums.zero_()
        return _over_pipeline(figures)

    def sharded_totals(self) -> dict[str, ShardedTensor]:
        """The sums since the counting began, for a checkpoint; counting goes on as if nothing had
        been asked. A collective call."""
        self._prepare()
        return self._sharded(
            {
                number: self._totals[number] + self._own_part(counter.sums_so_far(_readers()))
                for number, counter in self._counters.items()
            }
        )

    def empty_totals(self) -> dict[str, ShardedTensor]:
        """What to load a checkpoint's sums into, for `restore`."""
        self._prepare()
        return self._sharded(self._totals)

    def restore(self, totals: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's sums: what was loaded into `empty_totals`."""
        for number, own in self._totals.items():
            if own.numel():
                own.copy_(totals[usage_key(number)])

    def _sharded(self, parts: dict[int, Tensor]) -> dict[str, ShardedTensor]:
        """This rank's slots of each layer; fewer slots than ranks leave some with none."""
        begin, end = self._own_slots()
        return {
            usage_key(number): ShardedTensor(
                key=usage_key(number),
                data=part,
                dtype=part.dtype,
                local_shape=(end - begin,),
                global_shape=(self._config.memory.num_values,),
                global_offset=(begin,),
                # Not a regular grid: the slots need not be a multiple of the ranks.
                axis_fragmentations=None,
                replica_id=0,
            )
            for number, part in parts.items()
            if part.numel()
        }

    def _own_slots(self) -> tuple[int, int]:
        group, slots = _readers(), self._config.memory.num_values
        return slots * group.rank() // group.size(), slots * (group.rank() + 1) // group.size()

    def _own_part(self, sums: Tensor) -> Tensor:
        """Of sums over the group: this rank's slots, every token counted once."""
        begin, end = self._own_slots()
        parallel = self._config.parallel
        times = 1 if parallel.sequence_parallel else parallel.tensor_model_parallel_size
        return sums[begin:end].double() / times

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


def _readers() -> torch.distributed.ProcessGroup:
    """The ranks that read with the same layers."""
    return parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)


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
