"""Tensors that are described now and read later, so that a model never has to be in memory."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_memory.exceptions import CheckpointError

_BLOCK_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor in a file, or made of such.

    Reading it again reads the file again: nothing is kept.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    """(begin, end) to rows begin to end of the first dimension; (0, 1) of a scalar is all of it."""
    in_blocks: bool = True
    """Whether some rows cost less to read than all."""

    @property
    def num_rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def num_bytes(self) -> int:
        """Of all elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """All of it."""
        return self.read_rows(0, self.num_rows)

    def on_meta(self) -> Tensor:
        """A tensor of this shape and type without numbers."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def blocks(self) -> Iterator[tuple[int, int]]:
        """(begin, end) of the blocks of rows to handle it in, each of some 256 MiB at most."""
        if not self.in_blocks or not self.shape or not self.num_bytes:
            yield 0, self.num_rows
            return
        rows = max(1, _BLOCK_BYTES * self.num_rows // self.num_bytes)
        for begin in range(0, self.num_rows, rows):
            yield begin, min(begin + rows, self.num_rows)

    def to(self, dtype: torch.dtype, name: str = "a tensor") -> "LazyTensor":
        """The same numbers in another type, rounded.

        Args:
            dtype: the type.
            name: for messages.

        Reading it raises CheckpointError where a number is beyond the type's largest.
        """
        if dtype == self.dtype:
            return self
        return dataclasses.replace(
            self,
            dtype=dtype,
            read_rows=lambda begin, end: _rounded(self.read_rows(begin, end), dtype, name),
        )

    def first_rows(self, count: int) -> "LazyTensor":
        """Without the rows from `count` on."""
        assert count <= self.num_rows, f"{count} rows of {self.shape}"
        return dataclasses.replace(self, shape=(count, *self.shape[1:]))

    def with_zero_rows(self, count: int) -> "LazyTensor":
        """With rows of zeros added up to `count`."""
        own = self.num_rows
        if count == own:
            return self

        def read_rows(begin: int, end: int) -> Tensor:
            rows = self.read_rows(min(begin, own), min(end, own))
            padding = rows.new_zeros(max(0, end - max(begin, own)), *self.shape[1:])
            return torch.cat((rows, padding))

        return dataclasses.replace(self, shape=(count, *self.shape[1:]), read_rows=read_rows)


def _rounded(rows: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    rounded = rows.to(dtype)
    if not (rows.dtype.is_floating_point and dtype.is_floating_point):
        return rounded
    largest = torch.finfo(dtype).max
    if torch.finfo(rows.dtype).max <= largest:
        return rounded
    lost = rounded.isinf() & rows.isfinite()
    if lost.any():
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} has the number {rows[lost][0].item():.6g}, which {kind} cannot hold: its "
            f"largest is {largest:.6g}. Give --dtype fp32, or correct the number where that is too "
            "narrow as well"
        )
    return rounded


def from_memory(tensor: Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(
        shape=tuple(tensor.shape),
        dtype=tensor.dtype,
        read_rows=lambda begin, end: tensor[begin:end] if tensor.dim() else tensor,
    )


def made_of(
    sources: Sequence[LazyTensor], function: Callable[[Sequence[Tensor]], Tensor]
) -> LazyTensor:
    """What a function makes of whole tensors; its shape is found without reading any."""
    shown = function([source.on_meta() for source in sources])
    return LazyTensor(
        shape=tuple(shown.shape),
        dtype=shown.dtype,
        read_rows=lambda begin, end: function([source.read() for source in sources])[begin:end],
        in_blocks=False,
    )
