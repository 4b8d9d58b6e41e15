"""Table rows as fp32 for an update, and back, in kernels. See precision.py.

A program owns a row and goes through it in blocks of columns; up to 4096 columns are one block,
which stays in registers and is written to the fp8 shadow from there. bf16 numbers are read and
written as the int16 of their bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.chunks import kernel_table
from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.shadow_triton import (
    finite_magnitude,
    float_to_e4m3,
    plan_quantize_rows,
    row_scale,
)
from memory_kernels.triton_rows import row_address

_LARGEST_BLOCK = 4096
_LEAST_BLOCK = 4  # the random bits come four columns at a time
_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.int16,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.uint8: tl.uint8,
}


def states(**lists: Sequence[Tensor]) -> dict[str, Any]:
    """Kernel arguments for tables and states that are all cut alike: for each name what
    `row_address` takes as table, and the type of its elements as NAME_TYPE. An empty list is None.
    """
    arguments: dict[str, Any] = {}
    for name, chunks in lists.items():
        bits = [c.view(torch.int16) if c.dtype == torch.bfloat16 else c for c in chunks]
        arguments[name] = kernel_table(bits) if bits else None
        arguments[f"{name.upper()}_TYPE"] = _DTYPES[bits[0].dtype] if bits else None
    return arguments


def cut(table: Sequence[Tensor], *others: Sequence[Tensor]) -> dict[str, Any]:
    """Kernel arguments on how the table is cut and how a program goes through a row.

    Args:
        others: remainder, states and shadow values, cut as the table, rows without gaps.
    """
    num_columns = table[0].shape[1]
    block = min(max(next_power_of_2(num_columns), _LEAST_BLOCK), _LARGEST_BLOCK)
    chunks = [chunk for chunks in (table, *others) for chunk in chunks]
    return dict(
        num_columns=num_columns,
        row_stride=table[0].stride(0),
        chunk_rows=max(len(table[0]), 1),
        BLOCK=block,
        NUM_BLOCKS=ceil_div(num_columns, block),
        CHUNKED=len(table) > 1,
        ALIGNED=all(chunk.is_meta or chunk.data_ptr() % 16 == 0 for chunk in chunks),
    )


def fused_shadow(table: Sequence[Tensor], shadow: Sequence[Tensor]) -> dict[str, Any]:
    """Kernel arguments for the fp8 shadow that an update writes: None if a row is several blocks,
    which `shadow_launches` sees to."""
    fits = bool(shadow) and table[0].shape[1] <= _LARGEST_BLOCK
    return dict(
        codes=kernel_table(shadow[:-1]) if fits else None, scales=shadow[-1] if fits else None
    )


def shadow_launches(
    table: Sequence[Tensor], shadow: Sequence[Tensor], rows: Tensor | None, num_rows: Tensor | None
) -> list[Launch]:
    """The second launch, which quantises the changed rows, where the update could not."""
    if not shadow or table[0].shape[1] <= _LARGEST_BLOCK:
        return []
    return [plan_quantize_rows(list(table), list(shadow[:-1]), shadow[-1], rows, num_rows)]


def warps(table: Sequence[Tensor], elements_a_thread: int = 16) -> int:
    """Warps of a program."""
    block = min(next_power_of_2(table[0].shape[1]), _LARGEST_BLOCK)
    return max(block // (32 * elements_a_thread), 1)


@triton.jit
def bits_of(values):
    """The bits of fp32 values as int32, every NaN as 0x7FC00000."""
    return tl.where(values == values, values.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def to_float(stored):
    """fp32 of what `store_rounded` or a store of fp32 wrote."""
    if stored.dtype == tl.int16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return stored


@triton.jit
def nearest_bf16(values):
    """The bits (int16) of the nearest bf16, ties to even."""
    bits = bits_of(values)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)


@triton.jit
def store_rounded(address, values, mask):
    """Store fp32 values as fp32 or, to an int16 pointer, as the nearest bf16."""
    if address.dtype.element_ty == tl.int16:
        tl.store(address, nearest_bf16(values), mask=mask)
    else:
        tl.store(address, values, mask=mask)


@triton.jit
def random_16_bits(seed, step, row, first_column, BLOCK: tl.constexpr):
    """[BLOCK] int32 in [0, 2^16), for the columns of a row from first_column on."""
    group = (first_column // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    a, b, c, d = tl.philox(seed, group, zero + row.to(tl.uint32), zero + step.to(tl.uint32), zero)
    mixed = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return (mixed >> 16).to(tl.int32)


@triton.jit
def load_weights(address, remainder_address, mask, ROUNDING: tl.constexpr):
    stored = tl.load(address, mask=mask, other=0)
    if ROUNDING == "exact":
        low = tl.load(remainder_address, mask=mask, other=0).to(tl.int32)
        return ((stored.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
    else:
        return to_float(stored)


@triton.jit
def store_weights(
    address,
    remainder_address,
    weights,
    mask,
    seed,
    step,
    row,
    first_column,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store fp32 weights; returns them as the table has them now."""
    stored = weights
    if ROUNDING == "exact":
        bits = bits_of(weights)
        high = (bits + 0x8000) >> 16
        tl.store(remainder_address, (bits - (high << 16)).to(tl.int16), mask=mask)
        stored = (high << 16).to(tl.float32, bitcast=True)
        tl.store(address, high.to(tl.int16), mask=mask)
    elif ROUNDING == "stochastic":
        high = (bits_of(weights) + random_16_bits(seed, step, row, first_column, BLOCK)) >> 16
        stored = (high << 16).to(tl.float32, bitcast=True)
        tl.store(address, high.to(tl.int16), mask=mask)
    elif address.dtype.element_ty == tl.int16:
        high = nearest_bf16(weights)
        stored = to_float(high)
        tl.store(address, high, mask=mask)
    else:
        tl.store(address, weights, mask=mask)
    return stored


@triton.jit
def store_shadow(
    codes,
    scales,
    stored,
    row,
    columns,
    mask,
    num_columns,
    chunk_rows,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write a whole row to the fp8 shadow."""
    largest = tl.max(tl.where(mask, finite_magnitude(stored), 0.0), 0)
    scale, inverse = row_scale(largest)
    address = row_address(codes, row, num_columns, chunk_rows, CHUNKED, ALIGNED, tl.uint8)
    tl.store(address + columns, float_to_e4m3(stored * inverse), mask=mask)
    tl.store(scales + row, scale)
