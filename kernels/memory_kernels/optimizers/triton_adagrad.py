"""The updates of RowAdagrad and RowWiseAdagrad: one program a row."""

import triton
import triton.language as tl

from memory_kernels.launch import Launch
from memory_kernels.optimizers.triton_weights import (
    cut,
    fused_shadow,
    load_weights,
    states,
    store_shadow,
    store_weights,
    warps,
)
from memory_kernels.triton_rows import row_address


@triton.jit(do_not_specialize=["seed", "step"])
def row_adagrad_kernel(
    rows,
    gradients,
    squared_norms,
    num_rows,
    scale,
    table,
    remainder,
    sums,
    codes,
    scales,
    seed,
    step,
    lr,
    eps,
    num_columns,
    row_stride,
    chunk_rows,
    ROUNDING: tl.constexpr,
    ROW_WISE: tl.constexpr,
    TABLE_TYPE: tl.constexpr,
    REMAINDER_TYPE: tl.constexpr,
    SUMS_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if index >= tl.load(num_rows):
        return
    row = tl.load(rows + index)
    weights_row = row_address(table, row, row_stride, chunk_rows, CHUNKED, ALIGNED, TABLE_TYPE)
    remainder_row = weights_row
    if ROUNDING == "exact":
        remainder_row = row_address(
            remainder, row, num_columns, chunk_rows, CHUNKED, ALIGNED, REMAINDER_TYPE
        )
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale)
    if ROW_WISE:
        # Row sums lie 4 bytes apart: of a chunk's address no more than that may be promised.
        sums_row = row_address(sums, row, 1, chunk_rows, CHUNKED, False, SUMS_TYPE)
        row_sum = tl.load(sums_row)
        row_sum += tl.load(squared_norms + index) / num_columns * factor * factor
        rate = lr / (tl.sqrt(row_sum) + eps) * factor
        tl.debug_barrier()  # every warp reads the sum before one of them writes it
        tl.store(sums_row, row_sum)
    else:
        sums_row = row_address(sums, row, num_columns, chunk_rows, CHUNKED, ALIGNED, SUMS_TYPE)
    for block in range(NUM_BLOCKS):
        first = block * BLOCK
        columns = first + tl.arange(0, BLOCK)
        mask = columns < num_columns
        g = tl.load(gradients + index * num_columns + columns, mask=mask, other=0.0)
        g = g.to(tl.float32)
        p = load_weights(weights_row + columns, remainder_row + columns, mask, ROUNDING)
        if ROW_WISE:
            p -= rate * g
        else:
            g *= factor
            total = tl.load(sums_row + columns, mask=mask, other=1.0) + g * g
            tl.store(sums_row + columns, total, mask=mask)
            p -= lr * g / (tl.sqrt(total) + eps)
        stored = store_weights(
            weights_row + columns,
            remainder_row + columns,
            p,
            mask,
            seed,
            step,
            row,
            first,
            ROUNDING,
            BLOCK,
        )
        if codes is not None:
            store_shadow(
                codes,
                scales,
                stored,
                row,
                columns,
                mask,
                num_columns,
                chunk_rows,
                CHUNKED,
                ALIGNED,
            )


def plan_row_adagrad(
    table, remainder, shadow, rounding, seed, step, gradient, scale, sums, lr, eps
) -> Launch:
    """Adagrad on the gradient's rows, sums [S, D], or row-wise, sums [S]; see operators.py."""
    rows, gradients, squared_norms, num_rows = gradient
    row_wise = sums[0].dim() == 1
    return Launch(
        kernel=row_adagrad_kernel,
        grid=(len(rows),),
        arguments=dict(
            rows=rows,
            gradients=gradients,
            squared_norms=squared_norms,
            num_rows=num_rows,
            scale=scale,
            seed=seed,
            step=step,
            lr=lr,
            eps=eps,
            ROUNDING=rounding,
            ROW_WISE=row_wise,
            **states(table=table, remainder=remainder, sums=sums),
            **cut(table, remainder, shadow[:-1], [] if row_wise else sums),
            **fused_shadow(table, shadow),
        ),
        num_warps=warps(table),
    )
