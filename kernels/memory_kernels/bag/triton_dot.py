"""The row dot, h[t, b] = x[t] . table[indices[t, b]]: the bag's adjoint.

Memory bandwidth bounds it: T * B rows of D columns are read once. A warp takes READS_A_PROGRAM
reads of one token, ROWS at a time, and walks over the columns in blocks of 16 bytes a lane; lanes
are added up once, at the end. x[t] comes from the cache after the first rows.
Axes: T tokens, B rows read a token, S rows of the table, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.bag.triton_forward import columns_of_a_warp
from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.shadow_triton import e4m3_bytes, e4m3_to_float
from memory_kernels.triton_rows import row_address, table_arguments

_ROWS_IN_FLIGHT = 4  # each with a block of products in registers
_READS_A_PROGRAM = 32
_SUMS_A_PROGRAM = 512


@triton.jit
def row_dot_kernel(
    h,
    table,
    scales,
    indices,
    x,
    num_columns,
    row_stride,
    chunk_rows,
    BAG: tl.constexpr,
    READS: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_DTYPE: tl.constexpr,
):
    parts: tl.constexpr = (BAG + READS - 1) // READS
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    for first in range(0, READS, ROWS):
        read = part * READS + first + tl.arange(0, ROWS)
        in_bag = read < BAG
        row = tl.load(indices + token * BAG + read, mask=in_bag, other=0)
        address = row_address(table, row, row_stride, chunk_rows, CHUNKED, ALIGNED, TABLE_DTYPE)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for number in range(NUM_BLOCKS):
            columns = number * BLOCK + tl.arange(0, BLOCK)
            in_row = columns < num_columns
            values = tl.load(
                address[:, None] + columns[None, :],
                mask=in_bag[:, None] & in_row[None, :],
                other=0.0,
            )
            if scales is not None:
                values = e4m3_to_float(values)
            factor = tl.load(x + token * num_columns + columns, mask=in_row, other=0.0)
            products += values.to(tl.float32) * factor.to(tl.float32)[None, :]
        dots = tl.sum(products, 1)
        if scales is not None:
            dots *= tl.load(scales + row, mask=in_bag, other=0.0)
        tl.store(h + token * BAG + read, dots, mask=in_bag)


def plan_row_dot(
    h: Tensor, table: list[Tensor], scales: Tensor | None, indices: Tensor, x: Tensor
) -> Launch:
    """h [T, B] fp32 from contiguous operands.

    Args:
        table: the table's chunks, or with scales [S] those of its fp8 values.
    """
    num_tokens, bag_size = indices.shape
    num_columns = x.shape[1]
    block = columns_of_a_warp(num_columns, max(table[0].element_size(), x.element_size()))
    reads = min(_READS_A_PROGRAM, next_power_of_2(bag_size))
    return Launch(
        kernel=row_dot_kernel,
        grid=(num_tokens * ceil_div(bag_size, reads),),
        arguments=dict(
            h=h,
            scales=scales,
            indices=indices,
            x=x,
            num_columns=num_columns,
            BAG=bag_size,
            READS=reads,
            ROWS=min(_ROWS_IN_FLIGHT, reads),
            NUM_BLOCKS=ceil_div(num_columns, block),
            BLOCK=block,
            **table_arguments(e4m3_bytes(table)),
        ),
        num_warps=1,
    )


@triton.jit
def sum_blocks_kernel(
    sums, parts, places, num_sums, stride, NUM_BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """The sum of what each block of columns gave, block 0 first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < num_sums
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(NUM_BLOCKS):
        total += tl.load(parts + tl.cast(number, tl.int64) * stride + at, mask=held, other=0.0)
    if places is not None:
        at = tl.load(places + at, mask=held, other=0).to(tl.int64)
    tl.store(sums + at, total, mask=held)


def plan_sum_blocks(sums: Tensor, parts: Tensor, places: Tensor | None) -> Launch:
    """sums[places[p]] = sum over blocks of parts [blocks, P]; places None: each to its own."""
    num_blocks, num_sums = parts.shape
    return Launch(
        kernel=sum_blocks_kernel,
        grid=(ceil_div(num_sums, _SUMS_A_PROGRAM),),
        arguments=dict(
            sums=sums,
            parts=parts,
            places=places,
            num_sums=num_sums,
            stride=parts.stride(0),
            NUM_BLOCKS=num_blocks,
            BLOCK=_SUMS_A_PROGRAM,
        ),
    )


def row_dot(table, indices, x, shadow) -> Tensor:
    """h [T, B] in fp32; see the operator of this name in operators.py."""
    h = torch.empty(indices.shape, dtype=torch.float32, device=indices.device)
    *values, scales = shadow if shadow else (*table, None)
    plan_row_dot(h, values, scales, indices.contiguous(), x.contiguous()).run()
    return h
