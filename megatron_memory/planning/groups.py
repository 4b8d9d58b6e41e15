"""The ranks that exchange with each other, and what a collective costs them.

Megatron's order of ranks: tensor-parallel ones are next to each other, then context-parallel,
data-parallel and pipeline ranks.
"""

import dataclasses
from typing import Literal

from megatron_memory.config import Config

GroupName = Literal[
    "tensor", "context", "neighbours", "memory", "data", "copies", "pipeline", "replicas"
]
"""neighbours: data-parallel ranks that share a table's columns (or the experts); memory: all ranks
that share them; copies: ranks with the same columns; data: data- and context-parallel ranks;
replicas: pipeline ranks with a copy of the same parameters."""
Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Equally spaced ranks."""

    name: GroupName
    size: int
    stride: int
    """Distance from one to the next."""
    pipeline_ranks: tuple[int, ...] = ()
    """Those of replicas, which need not be equally spaced."""

    def ranks_in_node(self, gpus_per_node: int) -> int:
        """Of the group, on one node."""
        return max(1, min(self.size, gpus_per_node // self.stride))


def groups(config: Config, world_size: int) -> dict[GroupName, Group]:
    """Every group that a rank is in."""
    parallel = config.parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    copies = config.data_parallel_size(world_size) * context
    shared = config.expert_group_size
    pipeline = parallel.pipeline_model_parallel_size
    sizes: dict[GroupName, tuple[int, int]] = {
        "tensor": (tensor, 1),
        "context": (context, tensor),
        "neighbours": (shared, tensor),
        "memory": (tensor * shared, 1),
        "data": (copies, tensor),
        "copies": (copies // shared, tensor * shared),
        "pipeline": (pipeline, world_size // pipeline),
    }
    return {
        name: Group(name=name, size=size, stride=stride) for name, (size, stride) in sizes.items()
    }


def replicas(config: Config, world_size: int, pipeline_ranks: tuple[int, ...]) -> Group:
    """The ranks of other pipeline ranks with the same parameters."""
    return Group(
        name="replicas",
        size=len(pipeline_ranks),
        stride=world_size // config.parallel.pipeline_model_parallel_size,
        pipeline_ranks=pipeline_ranks,
    )


def sent_bytes(collective: Collective, size: int, ranks: int) -> int:
    """Bytes that each rank sends, in rings, for a tensor of `size` bytes over so many ranks.

    The tensor is the whole one: what a gather ends with, what a reduce-scatter begins with. A ring
    moves all of it but the rank's own part, and an all-reduce does so twice: it is a reduce-scatter
    and a gather.
    """
    if collective == "send":
        return size
    once = size * (ranks - 1) // ranks
    return 2 * once if collective == "all-reduce" else once


def network_share(collective: Collective, group: Group, gpus_per_node: int) -> float:
    """The part of what a rank sends that leaves its node, as a mean over the node's ranks.

    A ring enters and leaves a node once, whatever the number of its ranks there; an all-to-all
    sends to every rank alike.
    """
    here = group.ranks_in_node(gpus_per_node)
    if here == group.size:
        return 0.0
    if collective == "all-to-all":
        return (group.size - here) / (group.size - 1)
    return 1.0 if collective == "send" else 1.0 / here
