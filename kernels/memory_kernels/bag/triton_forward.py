"""Forward of the bag: a weighted sum of table rows for each token, gated if asked.

Memory bandwidth bounds it: T * B rows of D columns are read once. One warp owns 16 bytes a lane of
a row (256 bf16 columns), has ROWS rows in flight and sums them in its own registers; column blocks
are the outermost axis of the grid, so that the programs running at one time read one slice of the
table. Axes: T tokens, B rows read a token, S rows of the table, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.shadow_triton import e4m3_bytes, e4m3_to_float
from memory_kernels.triton_rows import row_address, table_arguments

_ROWS_IN_FLIGHT = 8
_BYTES_A_WARP = 512  # 32 lanes of 16 bytes


@triton.jit
def bag_sum_kernel(
    y,
    sums,
    table,
    scales,
    indices,
    weights,
    gate,
    num_tokens,
    num_columns,
    row_stride,
    chunk_rows,
    BAG: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_DTYPE: tl.constexpr,
):
    program = tl.program_id(0)
    token = (program % num_tokens).to(tl.int64)
    columns = (program // num_tokens) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < num_columns
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, BAG, ROWS):
        read = first + tl.arange(0, ROWS)
        in_bag = read < BAG
        row = tl.load(indices + token * BAG + read, mask=in_bag, other=0)
        weight = tl.load(weights + token * BAG + read, mask=in_bag, other=0.0).to(tl.float32)
        if scales is not None:
            weight *= tl.load(scales + row, mask=in_bag, other=0.0)
        address = row_address(table, row, row_stride, chunk_rows, CHUNKED, ALIGNED, TABLE_DTYPE)
        values = tl.load(
            address[:, None] + columns[None, :],
            mask=in_bag[:, None] & in_row[None, :],
            other=0.0,
        )
        if scales is not None:
            values = e4m3_to_float(values)
        total += tl.sum(values.to(tl.float32) * weight[:, None], 0)
    out = token * num_columns + columns
    if gate is not None:
        tl.store(sums + out, total.to(sums.dtype.element_ty), mask=in_row)
        g = tl.load(gate + out, mask=in_row, other=0.0).to(tl.float32)
        total *= g * tl.sigmoid(g)
    tl.store(y + out, total.to(y.dtype.element_ty), mask=in_row)


def plan_bag_sum(
    y: Tensor,
    sums: Tensor | None,
    table: list[Tensor],
    scales: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
) -> Launch:
    """y [T, D] (and the sums before the gate, in training) from contiguous operands.

    Args:
        table: the table's chunks, or with scales [S] those of its fp8 values.
    """
    num_tokens, bag_size = indices.shape
    num_columns = y.shape[1]
    block = columns_of_a_warp(num_columns, table[0].element_size())
    return Launch(
        kernel=bag_sum_kernel,
        grid=(num_tokens * ceil_div(num_columns, block),),
        arguments=dict(
            y=y,
            sums=sums,
            scales=scales,
            indices=indices,
            weights=weights,
            gate=gate,
            num_tokens=num_tokens,
            num_columns=num_columns,
            BAG=bag_size,
            BLOCK=block,
            ROWS=min(_ROWS_IN_FLIGHT, next_power_of_2(bag_size)),
            **table_arguments(e4m3_bytes(table)),
        ),
        num_warps=1,
    )


def columns_of_a_warp(num_columns: int, element_size: int) -> int:
    """Columns that one warp reads at once, 16 bytes a lane; fewer for a narrower table."""
    return min(_BYTES_A_WARP // element_size, next_power_of_2(num_columns))


def weighted_bag(table, indices, weights, gate, shadow) -> tuple[Tensor, Tensor]:
    """y and the sums before the gate; see the operator of this name in operators.py."""
    y = table[0].new_empty(indices.shape[0], table[0].shape[1])
    sums = None if gate is None else torch.empty_like(y)
    *values, scales = shadow if shadow else (*table, None)
    plan_bag_sum(
        y,
        sums,
        values,
        scales,
        indices.contiguous(),
        weights.contiguous(),
        None if gate is None else gate.contiguous(),
    ).run()
    return y, y.new_empty(0) if sums is None else sums
