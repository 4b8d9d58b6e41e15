"""Which slots are read, and how evenly ("Large Memory Layers with Product Keys", section 4.5)."""

import dataclasses
import math

import torch
from torch import Tensor

from megatron_memory.memory.routing import Route

USAGE_PREFIX = "memory_usage."


@dataclasses.dataclass(frozen=True, kw_only=True)
class UsageFigures:
    """How a layer used its slots over the tokens counted."""

    share_of_slots_read: float
    """Slots read at least once, of all: 0 to 1 (the paper's "memory usage")."""
    kl_to_uniform: float
    """KL divergence in nats of the slots' mean weights from the uniform distribution; 0 is
    perfectly even."""


def usage_key(layer: int) -> str:
    """What a checkpoint calls the sums of a layer, counted from 0, since the counting began."""
    return f"{USAGE_PREFIX}layers.{layer}.weight_sums"


class SlotUsage:
    """Sums the weights with which slots are read; one accumulator a memory layer.

    Args:
        num_slots: S; the sums take 4 * S bytes.
        device: of the routes.
    """

    def __init__(self, num_slots: int, device: torch.device):
        self.weight_sums = torch.zeros(num_slots, device=device)

    @torch.no_grad()
    def record(self, route: Route) -> None:
        """Count a route's reads."""
        self.weight_sums.index_add_(0, route.indices.flatten(), route.weights.flatten().float())

    def sums_so_far(self, group: torch.distributed.ProcessGroup | None) -> Tensor:
        """The sums [S] over all tokens counted by the group's ranks, while the counting goes on; a
        collective call."""
        sums = self.weight_sums.clone()
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    def figures(self, group: torch.distributed.ProcessGroup | None) -> UsageFigures:
        """The figures over all tokens counted by the group's ranks; a collective call."""
        if group is not None and group.size() > 1:
            torch.distributed.all_reduce(self.weight_sums, group=group)
        return usage_figures(self.weight_sums)


def usage_figures(weight_sums: Tensor) -> UsageFigures:
    """Figures of slots read with these summed weights, [S]."""
    read = weight_sums[weight_sums > 0].double()
    if read.numel() == 0:
        return UsageFigures(share_of_slots_read=0.0, kl_to_uniform=0.0)
    shares = read / read.sum()
    entropy = -(shares * shares.log()).sum().item()
    return UsageFigures(
        share_of_slots_read=read.numel() / weight_sums.numel(),
        kl_to_uniform=math.log(weight_sums.numel()) - entropy,
    )
