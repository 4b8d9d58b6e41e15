"""The collectives of a real training step, counted where torch hands them to the backend."""

import collections
from typing import Any

import torch
from megatron.core import parallel_state
from torch.distributed import ProcessGroup

from megatron_memory.config import Config
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training import step as step_module
from megatron_memory.training.setup import build_training_setup
from tests.planning.measured import batches

Counts = dict[tuple[str, str], int]
"""Bytes by group and collective: of the whole tensor, before or after, whichever is larger."""

METHODS = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "_allgather_base": "all-gather",
    "all_gather_single": "all-gather",
    "allgather": "all-gather",
    "allgather_coalesced": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "send": "send",
}
"""Of torch's process groups: one name or the other, by torch's version."""


def count(config: Config, padded_vocab_size: int) -> Counts:
    """Two steps on this rank; what the second one's collectives carry."""
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, padded_vocab_size)
    data = batches(config, padded_vocab_size)
    number = config.num_microbatches(torch.distributed.get_world_size())
    step_module.train_step(setup, data, number)
    counter = _Counter()
    with counter:
        step_module.train_step(setup, data, number)
    parallel_state.destroy_model_parallel()
    return dict(counter.bytes)


def count_all(configs: list[Config], padded_vocab_size: int) -> list[Counts]:
    """One after the other in this process."""
    return [count(config, padded_vocab_size) for config in configs]


class _Counter:
    """Replaces the methods of torch's process groups while it is active."""

    def __init__(self) -> None:
        self.bytes: collections.Counter[tuple[str, str]] = collections.Counter()
        self._originals: dict[str, Any] = {}

    def __enter__(self):
        for method, collective in METHODS.items():
            if method not in vars(ProcessGroup):
                continue
            # As the class has it: what getattr returns would no longer be a method.
            self._originals[method] = vars(ProcessGroup)[method]
            counted = self._counted(getattr(ProcessGroup, method), collective)
            setattr(ProcessGroup, method, counted)
        return self

    def __exit__(self, *_):
        for method, original in self._originals.items():
            setattr(ProcessGroup, method, original)

    def _counted(self, original, collective: str):
        def counted(group: ProcessGroup, *arguments, **options):
            if group.size() > 1:
                tensors = map(_tensors, (*arguments, *options.values()))
                sizes = [sum(map(_bytes, found)) for found in tensors]
                self.bytes[group_name(group), collective] += max(sizes)
            return original(group, *arguments, **options)

        return counted


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    if isinstance(argument, (list, tuple)):
        return [tensor for item in argument for tensor in _tensors(item)]
    return []


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def group_name(group: ProcessGroup) -> str:
    """By the ranks that it has: groups of the same ranks may be several objects."""
    return ",".join(map(str, torch.distributed.get_process_group_ranks(group)))
