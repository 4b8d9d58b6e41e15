"""Rows with very many reads: how they are cut, and the sum of their pieces.

The sorted reads are cut into slabs of equal size, each for one program. A row that crosses into
the next slab is finished by the program where it begins, unless it goes beyond that slab too: then
it is long, and cut into pieces, one for each slab:

    slabs       |  a       |  b       |  c       |  d       |
    rows        |1 1 2 3 3 |3 3 4 5 5 |5 5 5 5 5 |5 5 6 6 7 |
    programs    | a a a a a a a b b b . c c c c c . c c d d d

Row 3 is a's, which runs over. Row 5 is long: its pieces are the end of b, and c with what follows
in d. So each slab has one piece at most, and no program more than two slabs of work, whatever the
distribution. Pieces are added in the order of the slabs: groups of slabs that lie in one row first,
all at once, so that a row that every token reads is no long chain.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.bag.triton_sinks import finish_row
from memory_kernels.launch import Launch, ceil_div

SLABS_A_GROUP = 64


@triton.jit
def slab_reads(rows, begin, num_reads, SLAB: tl.constexpr):
    """Which reads are for the program of the slab that begins at read `begin`.

    Returns:
        the first, the one after the last (both counted from `begin`), and whether the last row of
        them is a piece of a long row.
    """
    at = begin + tl.arange(0, SLAB)
    here = tl.load(rows + at, mask=at < num_reads, other=-1)
    after = tl.load(rows + at + SLAB, mask=at + SLAB < num_reads, other=-1)
    beyond = begin + 2 * SLAB
    row_beyond = tl.load(rows + beyond, mask=beyond < num_reads, other=-1)
    row_before = tl.load(rows + begin - 1, mask=begin > 0, other=-1)
    size = tl.minimum(num_reads - begin, SLAB).to(tl.int32)
    first = tl.load(rows + begin)
    last = tl.load(rows + begin + size - 1)
    num_first = tl.sum((here == first).to(tl.int32))
    num_after = tl.sum((after == last).to(tl.int32))
    num_before = tl.where(row_before == first, num_first, 0)  # begun in an earlier slab
    is_covered = (num_before == SLAB) & (num_after > 0)
    is_long = row_beyond == last
    start = tl.where(is_covered, 0, num_before)
    stop = size + tl.where(is_long, 0, num_after)
    return start, stop, is_covered | is_long


@triton.jit
def _add_range(total, source, first, end, num_columns, columns, in_row, PIECES: tl.constexpr):
    at = first
    while at < end:
        piece = at + tl.arange(0, PIECES)
        values = tl.load(
            source + piece.to(tl.int64)[:, None] * num_columns + columns[None, :],
            mask=(piece < end)[:, None] & in_row[None, :],
            other=0.0,
        )
        total += tl.sum(values, 0)
        at += PIECES
    return total


@triton.jit
def sum_groups_kernel(
    groups,
    pieces,
    rows,
    num_reads,
    num_columns,
    num_groups,
    SLAB: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    group = tl.program_id(0) % num_groups
    columns = (tl.program_id(0) // num_groups) * BLOCK + tl.arange(0, BLOCK)
    in_row = columns < num_columns
    first = group * GROUP
    # The last read of the group's first slab, and the first read after the group.
    row_first = tl.load(rows + (first + 1).to(tl.int64) * SLAB - 1)
    after = (first + GROUP).to(tl.int64) * SLAB
    if row_first == tl.load(rows + after, mask=after < num_reads, other=-1):
        total = tl.zeros([BLOCK], tl.float32)
        total = _add_range(
            total, pieces, first, first + GROUP, num_columns, columns, in_row, PIECES
        )
        tl.store(groups + group.to(tl.int64) * num_columns + columns, total, mask=in_row)


@triton.jit
def _last_slab(rows, slab, row, num_slabs, SLAB: tl.constexpr):
    """The last slab whose first read is of `row`, by bisection; that of slab + 2 is."""
    low = slab + 2
    high = num_slabs
    while low + 1 < high:
        middle = low + (high - low) // 2
        if tl.load(rows + middle.to(tl.int64) * SLAB) == row:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def sum_pieces_kernel(
    groups,
    pieces,
    rows,
    num_reads,
    num_columns,
    num_slabs,
    sink,
    sink_stride,
    sink_chunk_rows,
    out_rows,
    numbers,
    norms,
    capacity,
    SLAB: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    FORM: tl.constexpr,
    SINK_CHUNKED: tl.constexpr,
    SINK_ALIGNED: tl.constexpr,
    SINK_DTYPE: tl.constexpr,
):
    slab = tl.program_id(0) % num_slabs
    block = tl.program_id(0) // num_slabs
    begin = slab.to(tl.int64) * SLAB
    last_read = begin + SLAB - 1
    beyond = begin + 2 * SLAB
    row = tl.load(rows + last_read, mask=last_read < num_reads, other=-1)
    row_beyond = tl.load(rows + beyond, mask=beyond < num_reads, other=-2)
    row_before = tl.load(rows + begin - 1, mask=begin > 0, other=-1)
    if (row == row_beyond) & (row != row_before):  # a long row that begins in this slab
        columns = block * BLOCK + tl.arange(0, BLOCK)
        in_row = columns < num_columns
        # The program of the slab before the last one took what the last one has of the row.
        end = _last_slab(rows, slab, row, num_slabs, SLAB)
        first_group = (slab + GROUP - 1) // GROUP
        last_group = end // GROUP
        to_groups = tl.minimum(first_group * GROUP, end)
        from_groups = tl.maximum(last_group * GROUP, to_groups)
        total = tl.zeros([BLOCK], tl.float32)
        total = _add_range(total, pieces, slab, to_groups, num_columns, columns, in_row, PIECES)
        total = _add_range(
            total, groups, first_group, last_group, num_columns, columns, in_row, PIECES
        )
        total = _add_range(total, pieces, from_groups, end, num_columns, columns, in_row, PIECES)
        finish_row(
            total,
            row,
            last_read,
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
            FORM,
            SINK_CHUNKED,
            SINK_ALIGNED,
            SINK_DTYPE,
        )


def plan_sum_groups(
    groups: Tensor, pieces: Tensor, rows: Tensor, slab: int, group: int, block: int
) -> Launch:
    """groups [slabs // group, D] from pieces [slabs, D], where a group lies in one row."""
    num_groups, num_columns = groups.shape
    return Launch(
        kernel=sum_groups_kernel,
        grid=(num_groups * ceil_div(num_columns, block),),
        arguments=dict(
            groups=groups,
            pieces=pieces,
            rows=rows,
            num_reads=len(rows),
            num_columns=num_columns,
            num_groups=num_groups,
            SLAB=slab,
            GROUP=group,
            BLOCK=block,
            PIECES=pieces_in_flight(num_columns),
        ),
        num_warps=1,
    )


def plan_sum_pieces(
    groups: Tensor,
    pieces: Tensor,
    rows: Tensor,
    slab: int,
    group: int,
    block: int,
    sink: dict,
) -> Launch:
    """The long rows' sums, to the sink (as `sink_arguments` describes it)."""
    num_slabs, num_columns = pieces.shape
    return Launch(
        kernel=sum_pieces_kernel,
        grid=(num_slabs * max(ceil_div(num_columns, block), 1),),
        arguments=dict(
            groups=groups,
            pieces=pieces,
            rows=rows,
            num_reads=len(rows),
            num_columns=num_columns,
            num_slabs=num_slabs,
            SLAB=slab,
            GROUP=group,
            BLOCK=block,
            PIECES=pieces_in_flight(num_columns),
            **sink,
        ),
        num_warps=1,
    )


def pieces_in_flight(num_columns: int) -> int:
    """How many pieces a program loads at once. Where Triton does not know that rows begin at
    multiples of 16 bytes, each number has an address and a mask of its own, and eight spill."""
    return 8 if num_columns % 16 == 0 else 4


def new_pieces(num_reads: int, num_columns: int, slab: int, device: torch.device) -> Tensor:
    """[slabs, D] fp32, undefined: room for a piece of each slab."""
    shape = (ceil_div(num_reads, slab), num_columns)
    return torch.empty(shape, dtype=torch.float32, device=device)
