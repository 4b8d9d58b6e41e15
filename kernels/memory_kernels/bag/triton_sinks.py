"""Where the sums of the table's gradient go: kernels' side of the three forms of operators.py."""

import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.triton_rows import row_address, table_arguments


def sink_arguments(
    form: str, sinks: list[Tensor], numbers: Tensor | None, norms: Tensor | None
) -> dict:
    """The kernel arguments that `finish_row` asks for.

    Args:
        sinks: as in operators.py.
        numbers: [P] int32, for `rows`: the place of each sorted read's row in the buffers.
        norms: [blocks, C] fp32, for `rows`: squared norms over each block of columns.
    """
    out_rows, chunks = (sinks[0], [sinks[1]]) if form == "rows" else (None, sinks)
    target = table_arguments(chunks)
    return dict(
        sink=target["table"],
        sink_stride=target["row_stride"],
        sink_chunk_rows=target["chunk_rows"],
        out_rows=out_rows,
        numbers=numbers,
        norms=norms,
        capacity=0 if norms is None else norms.shape[1],
        FORM=form,
        SINK_CHUNKED=target["CHUNKED"],
        SINK_ALIGNED=target["ALIGNED"],
        SINK_DTYPE=target["TABLE_DTYPE"],
    )


@triton.jit
def finish_row(
    total,
    row,
    read,
    block,
    columns,
    in_row,
    sink,
    sink_stride,
    sink_chunk_rows,
    out_rows,
    numbers,
    norms,
    capacity,
    FORM: tl.constexpr,
    SINK_CHUNKED: tl.constexpr,
    SINK_ALIGNED: tl.constexpr,
    SINK_DTYPE: tl.constexpr,
):
    """Give a row's sum over all its reads, of one block of columns, to the sink.

    No other program has this row and block, so that reading and writing is no race.

    Args:
        read: the place of any of the row's reads among the sorted ones.
    """
    if FORM == "rows":
        row_in_sink = tl.load(numbers + read).to(tl.int64)
        if block == 0:
            tl.store(out_rows + row_in_sink, row.to(tl.int64))
        held = tl.where(in_row, total, 0.0)
        tl.store(norms + block.to(tl.int64) * capacity + row_in_sink, tl.sum(held * held))
    else:
        row_in_sink = row
    target = row_address(
        sink, row_in_sink, sink_stride, sink_chunk_rows, SINK_CHUNKED, SINK_ALIGNED, SINK_DTYPE
    )
    if FORM == "main_grad":
        total += tl.load(target + columns, mask=in_row, other=0.0).to(tl.float32)
    tl.store(target + columns, total.to(SINK_DTYPE), mask=in_row)
