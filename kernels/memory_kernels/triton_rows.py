"""Addresses of table rows, for kernels: one tensor, or chunks (chunks.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.chunks import kernel_table

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def table_arguments(chunks: list[Tensor]) -> dict:
    """The kernel arguments that `row_address` asks for."""
    return dict(
        table=kernel_table(chunks),
        row_stride=chunks[0].stride(0),
        chunk_rows=max(len(chunks[0]), 1),
        CHUNKED=len(chunks) > 1,
        ALIGNED=all(chunk.is_meta or chunk.data_ptr() % 16 == 0 for chunk in chunks),
        TABLE_DTYPE=_TRITON_DTYPES[chunks[0].dtype],
    )


@triton.jit
def row_address(
    table,
    rows,
    row_stride,
    chunk_rows,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_DTYPE: tl.constexpr,
):
    """Pointers to the first column of `rows` (any shape), in int64 arithmetic throughout."""
    if CHUNKED:
        chunk = rows // chunk_rows  # in the rows' own dtype: to divide in int64 takes long
        rows -= chunk * chunk_rows
        base = tl.load(table + chunk).to(tl.pointer_type(TABLE_DTYPE))
        if ALIGNED:  # Triton sees that of a tensor, but not of an address that it loads.
            base = tl.multiple_of(base, 16)
    else:
        base = table
    return base + rows.to(tl.int64) * row_stride
