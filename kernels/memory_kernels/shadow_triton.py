"""fp8 (e4m3) in kernels: conversions by integer operations, and the quantisation of whole rows.

Kernels take e4m3 values as bytes (uint8): GPUs before compute capability 8.9 know no such type.
Both conversions give the bits of torch's, of any float.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.triton_rows import row_address, table_arguments

_ELEMENTS_A_PROGRAM = 2048


def e4m3_bytes(chunks: Sequence[Tensor]) -> list[Tensor]:
    """The chunks as kernels take them: those of fp8 as bytes, for `e4m3_to_float`."""
    fp8 = torch.float8_e4m3fn
    return [chunk.view(torch.uint8) if chunk.dtype == fp8 else chunk for chunk in chunks]


def _converts_e4m3(_semantic=None) -> bool:
    """Whether the GPU that is compiled for converts e4m3 itself; not so in the interpreter."""
    return _semantic is not None and "fp8e4nv" in _semantic.builder.options.supported_fp8_dtypes


_converts_e4m3.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def e4m3_to_float(bits):
    """The fp32 values of e4m3 bytes (uint8)."""
    if _converts_e4m3():
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return e4m3_to_float_by_bits(bits)


@triton.jit
def e4m3_to_float_by_bits(bits):
    """The same by integer operations, for every GPU."""
    # Sign to bit 31, exponent and fraction to bits 26 to 20: an fp32 number, normal or not, whose
    # exponent is biased by 127 where e4m3's is by 7. The shift copies the sign, the mask cuts it.
    placed = ((bits.to(tl.int32) << 24) >> 4) & -0x78100000
    value = placed.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def float_to_e4m3(values):
    """e4m3 bytes (uint8) of fp32 values, to the nearest, ties to even; finite values are 448 at
    most, infinities NaN."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Normal numbers: round off 20 bits of the fraction, then change the exponent's bias.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9, which is the spacing of fp32 numbers from 2^14 on.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E)
    code |= (bits >> 24) & 0x80
    return tl.where(magnitude >= 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def row_scale(largest):
    """Scale and its inverse for rows whose largest magnitude is given; see shadow.py."""
    exponent = (largest.to(tl.int32, bitcast=True) + 0x1FFFFF) >> 23
    exponent = tl.maximum(exponent, 9)
    scale = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
    inverse = ((262 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest > 0, scale, 1.0), inverse


@triton.jit
def finite_magnitude(values):
    """Magnitudes that a row's scale is chosen from."""
    magnitude = tl.abs(values)
    return tl.where(magnitude < float("inf"), magnitude, 0.0)


@triton.jit
def quantize_rows_kernel(
    values,
    scales,
    source,
    rows,
    num_rows,
    row_limit,
    num_columns,
    value_stride,
    source_stride,
    chunk_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNKED: tl.constexpr,
    SOURCE_ALIGNED: tl.constexpr,
    VALUE_ALIGNED: tl.constexpr,
    SOURCE_DTYPE: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    limit = row_limit
    if num_rows is not None:
        limit = tl.load(num_rows)
    if first >= limit:
        return
    index = first + tl.arange(0, ROWS)
    held = index < limit
    row = index.to(tl.int64)
    if rows is not None:
        row = tl.load(rows + index, mask=held, other=0)
    read = row_address(
        source, row, source_stride, chunk_rows, CHUNKED, SOURCE_ALIGNED, SOURCE_DTYPE
    )
    write = row_address(values, row, value_stride, chunk_rows, CHUNKED, VALUE_ALIGNED, tl.uint8)
    largest = tl.zeros([ROWS], tl.float32)
    x = tl.zeros([ROWS, BLOCK], tl.float32)
    for block in range(NUM_BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        mask = held[:, None] & (columns < num_columns)[None, :]
        x = tl.load(read[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(finite_magnitude(x), 1))
    scale, inverse = row_scale(largest)
    tl.store(scales + row, scale, mask=held)
    for block in range(NUM_BLOCKS):
        columns = block * BLOCK + tl.arange(0, BLOCK)
        mask = held[:, None] & (columns < num_columns)[None, :]
        if NUM_BLOCKS > 1:  # else it is still in registers
            x = tl.load(read[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        code = float_to_e4m3(x * inverse[:, None])
        tl.store(write[:, None] + columns[None, :], code, mask=mask)


def plan_quantize_rows(
    source: list[Tensor],
    values: list[Tensor],
    scales: Tensor,
    rows: Tensor | None,
    num_rows: Tensor | None,
) -> Launch:
    """Write rows of source (chunks of [S, D]) to values (as bytes, cut alike) and scales [S].

    Args:
        rows: [C] the rows to write, each once; or None for all.
        num_rows: [1] how many of them hold, on the device; or None for all.

    Raises:
        ValueError: 2^31 rows to write or more, which the kernel's int32 does not count.
    """
    num_columns = source[0].shape[1]
    count = sum(len(chunk) for chunk in source) if rows is None else len(rows)
    if count >= 2**31 - _ELEMENTS_A_PROGRAM:
        raise ValueError(f"shadow: fewer than 2^31 rows wanted, got {count}")
    block = min(next_power_of_2(num_columns), 2 * _ELEMENTS_A_PROGRAM)
    rows_a_program = max(_ELEMENTS_A_PROGRAM // block, 1)
    read = table_arguments(source)
    write = table_arguments(values)
    return Launch(
        kernel=quantize_rows_kernel,
        grid=(ceil_div(count, rows_a_program),),
        arguments=dict(
            values=write["table"],
            scales=scales,
            source=read["table"],
            rows=rows,
            num_rows=num_rows,
            row_limit=count,
            num_columns=num_columns,
            value_stride=write["row_stride"],
            source_stride=read["row_stride"],
            chunk_rows=read["chunk_rows"],
            ROWS=rows_a_program,
            BLOCK=block,
            NUM_BLOCKS=max(ceil_div(num_columns, block), 1),
            CHUNKED=read["CHUNKED"],
            SOURCE_ALIGNED=read["ALIGNED"],
            VALUE_ALIGNED=write["ALIGNED"],
            SOURCE_DTYPE=read["TABLE_DTYPE"],
        ),
        num_warps=4 if block <= _ELEMENTS_A_PROGRAM else 8,
    )
