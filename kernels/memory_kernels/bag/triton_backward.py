"""Backward of the bag: the table's gradient and that of the weights, in one pass over the reads.

The reads are sorted by row, so that a table row is read once, for both gradients, and a row's sum
is made in registers. A program takes a slab of SLAB sorted reads and one block of columns; it walks
over its reads, READS at a time in flight, and gives away a row's sum where the row changes. Hence
equal work for every program, whatever the distribution; rows that cross into another slab:
triton_pieces.py. Nothing is added by atomics: two runs give the same bits.

What moves, with U distinct rows among P = T * B reads of D columns (U = P / 2 is typical): U rows
of the table, U rows of the gradient, and P rows of x, which come from the L2 cache: column blocks
are the outermost axis of the grid, and one block of x (16k tokens of 1 KiB) stays in it. A row that
crosses one border is finished by running over it, not by partial sums: at two reads a row every
second slab has such a row, and writing and reading two partial sums in fp32 for each is 4% more
traffic, where running over is none. The temporaries are

- pieces of long rows, fp32 [P / SLAB, D]: B / SLAB copies of x in fp32,
- the order of the reads, 8 + 4 + 4 bytes a read (4 more for the form `rows`),
- dots of each block of columns, 4 bytes a read and block; none if the row is one block.

None grows with the table. Axes: T tokens, B rows read a token, S rows of the table, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.bag import triton_pieces
from memory_kernels.bag.reads import Reads, number_rows, sort_reads
from memory_kernels.bag.triton_dot import plan_sum_blocks
from memory_kernels.bag.triton_pieces import (
    new_pieces,
    plan_sum_groups,
    plan_sum_pieces,
    slab_reads,
)
from memory_kernels.bag.triton_sinks import finish_row, sink_arguments
from memory_kernels.chunks import num_rows
from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.shadow_triton import e4m3_bytes, e4m3_to_float
from memory_kernels.triton_rows import row_address, table_arguments

_SLAB = 128
_SLAB_OF_FEW_READS = 32
_FEW_READS = 2**20  # below, slabs of 128 reads leave multiprocessors without work
_READS_IN_FLIGHT = 2
_BYTES_A_LANE = 32  # of x: wide blocks spend fewer instructions a byte on adding up the lanes
_READS_A_PROGRAM = 1024


@triton.jit
def order_weights_kernel(
    positions, ordered_weights, order, weights, num_reads, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < num_reads
    position = tl.load(order + at, mask=held, other=0)
    weight = tl.load(weights + position, mask=held, other=0.0)
    tl.store(positions + at, position.to(tl.int32), mask=held)
    tl.store(ordered_weights + at, weight.to(tl.float32), mask=held)


def plan_order_weights(
    positions: Tensor, ordered_weights: Tensor, order: Tensor, weights: Tensor
) -> Launch:
    """weights [T, B] in the order of the sorted reads, fp32 [P], and the order as int32."""
    return Launch(
        kernel=order_weights_kernel,
        grid=(ceil_div(len(order), _READS_A_PROGRAM),),
        arguments=dict(
            positions=positions,
            ordered_weights=ordered_weights,
            order=order,
            weights=weights,
            num_reads=len(order),
            BLOCK=_READS_A_PROGRAM,
        ),
    )


@triton.jit
def bag_backward_kernel(
    x,
    rows,
    positions,
    weights,
    dots,
    pieces,
    table,
    scales,
    row_stride,
    chunk_rows,
    sink,
    sink_stride,
    sink_chunk_rows,
    out_rows,
    numbers,
    norms,
    capacity,
    num_reads,
    num_columns,
    num_slabs,
    BAG: tl.constexpr,
    SLAB: tl.constexpr,
    READS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_DTYPE: tl.constexpr,
    FORM: tl.constexpr,
    SINK_CHUNKED: tl.constexpr,
    SINK_ALIGNED: tl.constexpr,
    SINK_DTYPE: tl.constexpr,
):
    slab = tl.program_id(0) % num_slabs
    block = tl.program_id(0) // num_slabs
    columns = block * BLOCK + tl.arange(0, BLOCK)
    if EVEN:  # without masks the compiler needs fewer registers
        in_row = tl.full([BLOCK], True, tl.int1)
    else:
        in_row = columns < num_columns
    begin = slab.to(tl.int64) * SLAB
    at, stop, is_piece = slab_reads(rows, begin, num_reads, SLAB)
    if at < stop:
        rows += begin
        positions += begin
        weights += begin
        row = tl.load(rows + at)
        total = tl.zeros([BLOCK], tl.float32)
        while at < stop:
            # All loads of a trip first, so that they are in flight together.
            new_rows: tl.tuple = ()
            places: tl.tuple = ()
            factors: tl.tuple = ()
            xs: tl.tuple = ()
            values: tl.tuple = ()
            for i in tl.static_range(READS):
                held = at + i < stop
                read = tl.minimum(at + i, stop - 1)
                new_row = tl.load(rows + read)
                position = tl.load(positions + read)
                from_x = x + (position // BAG).to(tl.int64) * num_columns
                new_rows += (new_row,)
                places += (position,)
                factors += (tl.load(weights + read, mask=held, other=0.0),)
                xs += (tl.load(from_x + columns, mask=in_row & held, other=0.0),)
                if table is not None:
                    # Reads of one row follow one another: all but the first hit the L1 cache.
                    address = row_address(
                        table, new_row, row_stride, chunk_rows, CHUNKED, ALIGNED, TABLE_DTYPE
                    )
                    values += (
                        tl.load(
                            address + columns,
                            mask=in_row,
                            other=0.0,
                            eviction_policy="evict_first",
                        ),
                    )
            for i in tl.static_range(READS):
                if new_rows[i] != row:
                    finish_row(
                        total,
                        row,
                        begin + at + i - 1,
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
                    total = tl.zeros([BLOCK], tl.float32)
                    row = new_rows[i]
                x_i = xs[i].to(tl.float32)
                total += x_i * factors[i]
                if table is not None:
                    if scales is not None:
                        dot = tl.sum(x_i * e4m3_to_float(values[i])) * tl.load(scales + row)
                    else:
                        dot = tl.sum(x_i * values[i].to(tl.float32))
                    if ONE_BLOCK:
                        tl.store(dots + places[i], dot, mask=at + i < stop)
                    else:
                        place = block.to(tl.int64) * num_reads + begin + at + i
                        tl.store(dots + place, dot, mask=at + i < stop)
            at += READS
        if is_piece:
            tl.store(pieces + slab.to(tl.int64) * num_columns + columns, total, mask=in_row)
        else:
            finish_row(
                total,
                row,
                begin + stop - 1,
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


def plan_bag_backward(
    x: Tensor,
    rows: Tensor,
    positions: Tensor,
    weights: Tensor,
    dots: Tensor | None,
    pieces: Tensor,
    table: list[Tensor],
    scales: Tensor | None,
    bag_size: int,
    slab: int,
    sink: dict,
) -> Launch:
    """The gradient of all rows but the long ones, the long ones' pieces, and the dots.

    Args:
        x: [T, D], contiguous.
        rows: [P], sorted.
        positions: [P] int32, where each read stood.
        weights: [P] fp32, sorted as the rows are.
        dots: where there is one block of columns, [P] in the order of the positions; else [blocks,
            P] in the order of the rows; None: they are not wanted.
        pieces: [slabs, D] fp32.
        table: the table's chunks, or with scales [S] those of its fp8 values.
        sink: as `sink_arguments` describes it.
    """
    num_columns = x.shape[1]
    block = columns_of_a_program(x, scales is not None)
    num_blocks = max(ceil_div(num_columns, block), 1)
    source = table_arguments(e4m3_bytes(table))
    if dots is None:
        source.update(table=None)
    num_slabs = ceil_div(len(rows), slab)
    return Launch(
        kernel=bag_backward_kernel,
        grid=(num_slabs * num_blocks,),
        arguments=dict(
            x=x,
            rows=rows,
            positions=positions,
            weights=weights,
            dots=dots,
            pieces=pieces,
            scales=None if dots is None else scales,
            num_reads=len(rows),
            num_columns=num_columns,
            num_slabs=num_slabs,
            BAG=bag_size,
            SLAB=slab,
            READS=_READS_IN_FLIGHT,
            BLOCK=block,
            EVEN=num_columns > 0 and num_columns % block == 0,
            ONE_BLOCK=num_blocks == 1,
            **source,
            **sink,
        ),
        num_warps=1,
    )


def columns_of_a_program(x: Tensor, with_shadow: bool) -> int:
    """Columns of a block, for one warp: wide, or half of it where more of a wide block would lie
    beyond the last column.

    Half of it also for fp8 values: in a wide block a lane would load 16 of them but 8 of x at once,
    and trade them with other lanes.
    """
    num_columns = x.shape[1]
    wide = 32 * _BYTES_A_LANE // x.element_size()
    narrow = wide // 2
    if with_shadow or ceil_div(num_columns, narrow) * narrow < ceil_div(num_columns, wide) * wide:
        wide = narrow
    return min(wide, next_power_of_2(num_columns))


def slab_size(num_reads: int) -> int:
    """Reads of a slab."""
    return _SLAB if num_reads >= _FEW_READS else _SLAB_OF_FEW_READS


def bag_backward(table, indices, weights, x, shadow, form, sinks, with_dot) -> Tensor:
    """Fills the sinks and returns the dots; see the operator of this name in operators.py."""
    if indices.numel() == 0:
        if form == "rows":
            sinks[-1].zero_()
        return _new(indices.shape if with_dot else (0,), x)
    reads = sort_reads(indices, num_rows(table))
    return backward_of_reads(
        table, reads, weights.contiguous(), x.contiguous(), shadow, form, sinks, with_dot
    )


def backward_of_reads(
    table: list[Tensor],
    reads: Reads,
    weights: Tensor,
    x: Tensor,
    shadow: list[Tensor],
    form: str,
    sinks: list[Tensor],
    with_dot: bool,
) -> Tensor:
    """`bag_backward` with the reads sorted: one sort serves two tables that are read alike.

    Args:
        reads: of one or more.
        weights: [T, B], contiguous.
        x: [T, D], contiguous.
    """
    num_reads, num_columns = weights.numel(), x.shape[1]
    block = columns_of_a_program(x, bool(shadow))
    num_blocks = max(ceil_div(num_columns, block), 1)  # 1 also for a table without columns
    slab, group = slab_size(num_reads), triton_pieces.SLABS_A_GROUP
    positions = torch.empty(num_reads, dtype=torch.int32, device=x.device)
    ordered_weights = _new((num_reads,), x)
    plan_order_weights(positions, ordered_weights, reads.order, weights).run()

    h = _new(weights.shape if with_dot else (0,), x)
    dots = None if not with_dot else h if num_blocks == 1 else _new((num_blocks, num_reads), x)
    pieces = new_pieces(num_reads, num_columns, slab, x.device)
    groups = new_pieces(len(pieces) // group, num_columns, 1, x.device)
    values, scales = (shadow[:-1], shadow[-1]) if shadow else (table, None)
    sink, norms = _open_sinks(form, sinks, reads, num_blocks)
    plan_bag_backward(
        x,
        reads.rows,
        positions,
        ordered_weights,
        dots,
        pieces,
        values,
        scales,
        weights.shape[1],
        slab,
        sink,
    ).run()
    if len(pieces) > 2:  # of fewer slabs a row has no pieces
        plan_sum_groups(groups, pieces, reads.rows, slab, group, block).run()
        plan_sum_pieces(groups, pieces, reads.rows, slab, group, block, sink).run()
    if num_blocks > 1:
        if dots is not None:
            plan_sum_blocks(h, dots, positions).run()
        if norms is not None:
            plan_sum_blocks(sinks[2], norms, None).run()
    return h


def _open_sinks(
    form: str, sinks: list[Tensor], reads: Reads, num_blocks: int
) -> tuple[dict, Tensor | None]:
    """The sinks as kernels take them, and for `rows` the squared norms of each block."""
    if form != "rows":
        return sink_arguments(form, sinks, None, None), None
    _, gradients, squared_norms, count = sinks
    numbers = number_rows(reads.rows)
    torch.add(numbers[-1:], 1, out=count)
    norms = squared_norms[None]
    if num_blocks > 1:
        norms = torch.empty(
            num_blocks, len(gradients), dtype=torch.float32, device=gradients.device
        )
    return sink_arguments(form, sinks, numbers, norms), norms


def _new(shape, like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
