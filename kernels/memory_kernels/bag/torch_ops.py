"""The bag's sums on torch operators, for the CPU and for any device without a kernel of ours.

Axes: T tokens, B rows read a token, S rows of the table, D columns. Tables come as row chunks.

| function | serves |
|---|---|
| `weighted_bag`, `row_dot`, `bag_backward`, `gate_gradients` | the operators of operators.py |

| sum | used for |
|---|---|
| `bag_sum`: over the bag, table rows | forward of the bag, input gradient of the row dot |
| `bag_dot`: over the columns | weight gradient of the bag, forward of the row dot |
| `row_gradients`: over the tokens that read a row | table gradient of both |
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_kernels.bag.row_gradients import fill
from memory_kernels.checks import check_in_table
from memory_kernels.chunks import gather_rows, num_rows, rows_by_chunk
from memory_kernels.shadow import dequantize_rows

# Sums of this size are added to their rows while they are in the cache. Measured on two cores, 65k
# reads of 512 fp32 columns: 25 ms, against 75 ms with all sums at once.
_PART_BYTES = 2**21
_PART_BYTES_ELSEWHERE = 2**28  # launches cost more than the cache saves; bounds the temporary
_SUM_MODE = 0  # aten's number for embedding_bag's mode="sum"


def weighted_bag(
    table: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    shadow: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y and the sums before the gate; see the operator of this name in operators.py."""
    sums = bag_sum(*_one_tensor(table, shadow, indices), weights).to(table[0].dtype)
    return (sums, sums.new_empty(0)) if gate is None else (gate_sums(sums, gate), sums)


def row_dot(
    table: Sequence[Tensor], indices: Tensor, x: Tensor, shadow: Sequence[Tensor]
) -> Tensor:
    """h in fp32 (fp64 for an fp64 table); see the operator of this name in operators.py."""
    products = bag_dot(*_one_tensor(table, shadow, indices), x)
    return products.to(torch.promote_types(products.dtype, torch.float32))


def bag_backward(
    table: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    shadow: Sequence[Tensor],
    form: str,
    sinks: Sequence[Tensor],
    with_dot: bool,
) -> Tensor:
    """Fills the sinks and returns the dots; see the operator of this name in operators.py."""
    check_in_table("indices", indices, num_rows(table))
    num_filled = 0
    for rows, sums in row_gradient_parts(indices, weights, x):
        if form == "rows":
            fill(sinks, num_filled, rows, sums)
            num_filled += len(rows)
        else:
            add_rows(sinks, rows, sums)
    if form == "rows":
        sinks[-1].fill_(num_filled)
    if with_dot:
        return row_dot(table, indices, x, shadow)
    return x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))


def bag_sum(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """y[t] = sum over b of weights[t, b] * table[indices[t, b]].

    Args:
        table: [S, D].
        indices: [T, B], int32 or int64 (int32 is the faster one on the CPU).
        weights: [T, B]; rounded to the table's dtype, which torch's operator asks for.

    Returns:
        [T, D] in the table's dtype.
    """
    if indices.numel() == 0 or table.shape[1] == 0:
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
    if indices.numel() == 0 or table.shape[1] == 0:
        return table.new_zeros(num_tokens, bag_size)
    bags = torch.arange(num_tokens, dtype=indices.dtype, device=indices.device)
    # The product that embedding_bag's own backward makes for its weights: no [T, B, D] is written.
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x.to(table.dtype).contiguous(),
        table,
        indices.reshape(-1),
        bags * bag_size,
        bags.repeat_interleave(bag_size),
        _SUM_MODE,
    )
    return products.view(num_tokens, bag_size)


def _one_tensor(
    table: Sequence[Tensor], shadow: Sequence[Tensor], indices: Tensor
) -> tuple[Tensor, Tensor]:
    """torch's operators read one tensor of a usual dtype: the table, or of several chunks and of
    fp8 values a copy of the rows that are read, and their numbers in it."""
    check_in_table("indices", indices, num_rows(table))
    if len(table) == 1 and not shadow:
        return table[0], indices
    rows, numbers = indices.long().unique(return_inverse=True)
    if not shadow:
        return gather_rows(table, rows), numbers
    *values, scales = shadow
    # As bytes: torch cannot select rows of fp8 tensors everywhere.
    read = gather_rows([chunk.view(torch.uint8) for chunk in values], rows)
    return dequantize_rows(read.view(torch.float8_e4m3fn), scales[rows]), numbers


def row_gradients(indices: Tensor, weights: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that the tokens read, and sum over their reads of weights[t, b] * x[t] for each.

    Args:
        indices: [T, B], int32 or int64.
        weights: [T, B].
        x: [T, D].

    Returns:
        rows [R] int64, unique and ascending, and their sums [R, D] in fp32 (fp64 for fp64 x).
    """
    parts = list(row_gradient_parts(indices, weights, x))
    if not parts:
        accumulator = torch.promote_types(x.dtype, torch.float32)
        return indices.new_empty(0, dtype=torch.int64), x.new_empty(0, x.shape[1]).to(accumulator)
    rows, sums = zip(*parts, strict=True)
    return torch.cat(rows), torch.cat(sums)


def row_gradient_parts(
    indices: Tensor, weights: Tensor, x: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """`row_gradients` in parts of few enough rows that their sums stay in the cache.

    The work follows the number of reads and not the table's size. Summed in the order of the sorted
    reads, so that two runs give the same bits.
    """
    if indices.numel() == 0:
        return
    accumulator = torch.promote_types(x.dtype, torch.float32)
    x = x.to(accumulator)
    reads, order = torch.sort(indices.reshape(-1), stable=True)
    rows, counts = torch.unique_consecutive(reads, return_counts=True)
    tokens = (order // indices.shape[1]).to(indices.dtype)
    weights = weights.reshape(-1)[order].to(accumulator)
    starts = counts.cumsum(0) - counts
    part_bytes = _PART_BYTES if x.device.type == "cpu" else _PART_BYTES_ELSEWHERE
    part_rows = max(part_bytes // max(x.shape[1] * x.element_size(), 1), 1)
    if x.shape[1] == 0:  # embedding_bag takes no rows without columns
        yield rows.long(), x.new_empty(len(rows), 0)
        return
    borders = [*starts[::part_rows].tolist(), len(reads)]
    for number, (first, last) in enumerate(zip(borders, borders[1:], strict=False)):
        part = slice(number * part_rows, (number + 1) * part_rows)
        sums = F.embedding_bag(
            tokens[first:last],
            x,
            (starts[part] - first).to(tokens.dtype),
            per_sample_weights=weights[first:last],
            mode="sum",
        )
        yield rows[part].long(), sums


def add_rows(targets: Sequence[Tensor], rows: Tensor, sums: Tensor) -> None:
    """Add sums [R, D] to the rows [R], unique and ascending, of targets (chunks of [S, D])."""
    if len(targets) == 1:
        targets[0].index_add_(0, rows, sums.to(targets[0].dtype))
        return
    for target, local, part in rows_by_chunk(targets, rows):
        target.index_add_(0, local, sums[part].to(target.dtype))


def gate_sums(sums: Tensor, gate: Tensor) -> Tensor:
    """sums * silu(gate), [T, D] each, computed in fp32 and rounded once to the sums' dtype."""
    accumulator = torch.promote_types(sums.dtype, torch.float32)
    return (sums.to(accumulator) * F.silu(gate.to(accumulator))).to(sums.dtype)


def gate_gradients(grad_output: Tensor, sums: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_sums` for sums and gate, each in its own dtype and contiguous, computed in
    fp32."""
    accumulator = torch.promote_types(sums.dtype, torch.float32)
    grad, s, g = (tensor.to(accumulator) for tensor in (grad_output, sums, gate))
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    grad_gate = grad * s * (sigmoid + silu * (1 - sigmoid))
    return (grad * silu).to(sums.dtype).contiguous(), grad_gate.to(gate.dtype).contiguous()
