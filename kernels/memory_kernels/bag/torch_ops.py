"""The bag's three sums on torch operators, for the CPU and for any device without a kernel of ours.

Axes: T tokens, B rows read a token, S rows of the table, D columns.

| sum | used for |
|---|---|
| `bag_sum`: over the bag, table rows | forward of the bag, input gradient of the row dot |
| `bag_dot`: over the columns | weight gradient of the bag, forward of the row dot |
| `add_row_gradients`: over the tokens that read a row | table gradient of both |
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SUM_MODE = 0  # aten's number for embedding_bag's mode="sum"


def bag_sum(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """y[t] = sum over b of weights[t, b] * table[indices[t, b]].

    Args:
        table: [S, D].
        indices: [T, B], int32 or int64 (int32 is the faster one on the CPU).
        weights: [T, B]; rounded to the table's dtype, which torch's operator asks for.

    Returns:
        [T, D] in the table's dtype.
    """
    if indices.numel() == 0:
        return table.new_zeros(indices.shape[0], table.shape[1])
    return F.embedding_bag(indices, table, per_sample_weights=weights.to(table.dtype), mode="sum")


def bag_dot(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """h[t, b] = x[t] . table[indices[t, b]].

    Args:
        table: [S, D].
        indices: [T, B], int32 or int64.
        x: [T, D]; rounded to the table's dtype.

    Returns:
        [T, B] in the table's dtype.
    """
    num_tokens, bag_size = indices.shape
    if indices.numel() == 0:
        return table.new_zeros(num_tokens, bag_size)
    flat = indices.reshape(-1)
    bags = torch.arange(num_tokens, dtype=indices.dtype, device=indices.device)
    # The product that embedding_bag's own backward makes for its weights: no [T, B, D] is written.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.to(table.dtype).contiguous(),
        table,
        flat,
        bags * bag_size,
        bags.repeat_interleave(bag_size),
        _SUM_MODE,
    )
    return products.view(num_tokens, bag_size)


def row_gradients(indices: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that the tokens read, and sum over their reads of weights[t, b] * x[t] for each.

    The work follows the number of reads and not the table's size. Summed in the order of the sorted
    reads, so that two runs give the same bits.

    Args:
        indices: [T, B], int32 or int64.
        weights: [T, B].
        x: [T, D].

    Returns:
        rows [R], unique and ascending, and their sums [R, D] in fp32 (fp64 for fp64 x).
    """
    accumulator = torch.promote_types(x.dtype, torch.float32)
    bag_size = indices.shape[1]
    reads, order = torch.sort(indices.reshape(-1), stable=True)
    rows, counts = torch.unique_consecutive(reads, return_counts=True)
    starts = counts.cumsum(0) - counts
    sums = F.embedding_bag(
        order // bag_size,
        x.to(accumulator),
        starts,
        per_sample_weights=weights.reshape(-1)[order].to(accumulator),
        mode="sum",
    )
    return rows, sums


def add_row_gradients(target: Tensor, indices: Tensor, weights: Tensor, x: Tensor) -> None:
    """Add to target [S, D], in place, the gradient of a table read at `indices`; see
    row_gradients."""
    if indices.numel():
        rows, sums = row_gradients(indices, weights, x)
        target.index_add_(0, rows, sums.to(target.dtype))
