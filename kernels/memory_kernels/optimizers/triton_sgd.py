"""RowSGD's update: one program a row."""

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
def row_sgd_kernel(
    rows,
    gradients,
    num_rows,
    scale,
    table,
    remainder,
    codes,
    scales,
    seed,
    step,
    lr,
    num_columns,
    row_stride,
    chunk_rows,
    ROUNDING: tl.constexpr,
    TABLE_TYPE: tl.constexpr,
    REMAINDER_TYPE: tl.constexpr,
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
    for block in range(NUM_BLOCKS):
        first = block * BLOCK
        columns = first + tl.arange(0, BLOCK)
        mask = columns < num_columns
        g = tl.load(gradients + index * num_columns + columns, mask=mask, other=0.0)
        p = load_weights(weights_row + columns, remainder_row + columns, mask, ROUNDING)
        p -= lr * (g.to(tl.float32) * factor)
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


def plan_row_sgd(table, remainder, shadow, rounding, seed, step, gradient, scale, lr) -> Launch:
    """table -= lr * scale * gradient on the gradient's rows; see operators.py."""
    rows, gradients, _, num_rows = gradient
    return Launch(
        kernel=row_sgd_kernel,
        grid=(len(rows),),
        arguments=dict(
            rows=rows,
            gradients=gradients,
            num_rows=num_rows,
            scale=scale,
            seed=seed,
            step=step,
            lr=lr,
            ROUNDING=rounding,
            **states(table=table, remainder=remainder),
            **cut(table, remainder, shadow[:-1]),
            **fused_shadow(table, shadow),
        ),
        num_warps=warps(table),
    )
