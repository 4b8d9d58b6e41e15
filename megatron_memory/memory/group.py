"""The ranks that share a table's columns, and what they send each other.

Axes: T tokens of a rank's tensor-parallel group, C columns of the table on this rank; M neighbours.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_memory.memory.exchange import Exchange

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryGroup:
    """TP x M ranks, each with its own columns of every table: block `tp_rank * M + neighbour_rank`.

    Data-parallel neighbours have other tokens. Each looks up the tokens of all, in its columns, and
    gets its own tokens' back: all it holds of the group's output is [M * T, C], as many elements as
    [T, D / TP]. Every exchange has its transpose for its backward.
    """

    tp: ProcessGroup
    """Tensor-parallel ranks."""
    neighbours: ProcessGroup
    """M = `--memory-parallel-size` data-parallel ranks."""
    whole: ProcessGroup
    """All TP x M ranks."""
    copies: ProcessGroup
    """Ranks with the same columns, over which the tables' gradients are summed."""

    @classmethod
    def of(cls, groups: ProcessGroupCollection) -> "MemoryGroup":
        """From Megatron's groups: its experts', of which a memory is the only user."""
        return cls(tp=groups.tp, neighbours=groups.ep, whole=groups.tp_ep, copies=groups.expt_dp)

    @property
    def num_neighbours(self) -> int:
        """M."""
        return self.neighbours.size()

    def columns(self, value_dim: int) -> int:
        """C."""
        return value_dim // (self.tp.size() * self.num_neighbours)

    def first_column(self, value_dim: int) -> int:
        """Where this rank's columns begin in the whole table."""
        block = self.tp.rank() * self.num_neighbours + self.neighbours.rank()
        return block * self.columns(value_dim)

    def gather_tokens(self, x: Tensor, *, sequence_parallel: bool) -> Tensor:
        """[M * T, ...], the neighbours' tokens one after the other, from this rank's own.

        Each rank uses what it gets for its columns alone, so that the backward is a sum over all
        ranks, brought to the tokens' own. The slower network between neighbours comes first, and
        carries each token once.

        Args:
            x: [T / TP, ...] under sequence parallelism; else [T, ...], the same on every
                tensor-parallel rank.
        """
        if not sequence_parallel:
            if self.tp.size() > 1 and x.is_floating_point():
                x = copy_to_tensor_model_parallel_region(x, group=self.tp)
            return self._gather(x, self.neighbours)
        x = self._gather(self._gather(x, self.neighbours), self.tp)
        if self.num_neighbours == 1 or self.tp.size() == 1:
            return x
        shares = x.unflatten(0, (self.tp.size(), self.num_neighbours, -1))
        return shares.transpose(0, 1).flatten(0, 2)

    @staticmethod
    def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
        return x if group.size() == 1 else gather_from_sequence_parallel_region(x, group=group)

    def columns_to_tokens(self, y: Tensor) -> Tensor:
        """[T, M * C], own tokens, from [M * T, C], own columns."""
        return y if self.num_neighbours == 1 else all_to_all_hp2sp(y, group=self.neighbours)

    def begin_columns_to_tokens(self, y: Tensor) -> Exchange:
        """`columns_to_tokens(y)`, under way until `finish_columns_to_tokens`."""
        return Exchange(y, self.neighbours)

    def finish_columns_to_tokens(
        self, exchange: Exchange, coming: Tensor, compute: Callable[[], R]
    ) -> tuple[Tensor, R]:
        """[T, M * C], and what was computed meanwhile; see `Exchange.received`."""
        received, computed = exchange.received(coming, compute)
        return torch.cat(received.chunk(self.num_neighbours), dim=-1), computed

    def tokens_to_columns(self, x: Tensor) -> Tensor:
        """[M * T, C], own columns, from [T, M * C], own tokens."""
        return x if self.num_neighbours == 1 else all_to_all_sp2hp(x, group=self.neighbours)

    def sum_over_columns(self, parts: Tensor) -> Tensor:
        """The sum of all ranks' parts, for each to use with its own columns."""
        if self.whole.size() == 1:
            return parts
        total = reduce_from_tensor_model_parallel_region(parts, group=self.whole)
        return copy_to_tensor_model_parallel_region(total, group=self.whole)
