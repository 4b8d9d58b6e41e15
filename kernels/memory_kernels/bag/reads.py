"""The reads of a call, inverted: for each row of the table the places that read it.

Plain torch, with shapes that depend on no value, so that nothing waits for the device.
Axes: T tokens, B rows read a token, S rows of the table; P = T * B reads.
"""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
    """All reads, sorted by row; reads of one row in the order of the tokens."""

    rows: Tensor
    """[P], ascending: int32, or int64 for a table of 2^31 rows or more."""
    order: Tensor
    """[P] int64: where each stood in the flat indices, t * B + b."""


def sort_reads(indices: Tensor, num_rows: int) -> Reads:
    """The reads of indices [T, B], int32 or int64, of a table with num_rows rows.

    Half the bytes to sort where int32 holds every row's number.

    Raises:
        ValueError: 2^31 reads or more, whose places the kernels' int32 does not hold.
    """
    if indices.numel() >= 2**31:
        raise ValueError(
            f"indices: fewer than 2^31 reads in one call wanted, got {list(indices.shape)}"
        )
    dtype = torch.int32 if num_rows < 2**31 else torch.int64
    # Stable: the order of a row's reads decides the bits of its sum.
    rows, order = torch.sort(indices.reshape(-1).to(dtype), stable=True)
    return Reads(rows=rows, order=order)


def number_rows(rows: Tensor) -> Tensor:
    """[P] int32: the number of each read's row among the distinct ones, 0 first. rows [P] are
    ascending; P is 1 or more."""
    numbers = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    numbers[:1] = 0
    torch.cumsum(rows[1:] != rows[:-1], 0, dtype=torch.int32, out=numbers[1:])
    return numbers
