"""RowAdam's update and catch-up: one program a row. adam.py has the formula."""

import math

import triton
import triton.language as tl

from memory_kernels.launch import Launch
from memory_kernels.optimizers.triton_weights import (
    cut,
    fused_shadow,
    load_weights,
    states,
    store_rounded,
    store_shadow,
    store_weights,
    to_float,
    warps,
)
from memory_kernels.triton_rows import row_address

_WIDE = 2048


@triton.jit
def catch_up(
    p, m, v, last, skipped, history, beta1, root_beta2, log_beta1, log_beta2, eps, looped_steps
):
    """p, m, v of step last + skipped; history [steps, 4] fp64: decay, a, c, sum of log decay."""
    moving = tl.sum((m != 0).to(tl.int32), 0) > 0
    looped = tl.where(moving, tl.minimum(skipped, looped_steps), 0)
    entry = history + last.to(tl.int64) * 4
    start = entry
    root = tl.sqrt(v)
    done = 0
    while done < looped:
        entry += 4
        decay = tl.load(entry).to(tl.float32)
        step_size = tl.load(entry + 1).to(tl.float32)
        correction = tl.load(entry + 2).to(tl.float32)
        m *= beta1
        root *= root_beta2
        p = p * decay - step_size * m / (root * correction + eps)
        done += 1
    if skipped > looped:
        log_decay = tl.load(start + skipped.to(tl.int64) * 4 + 3) - tl.load(entry + 3)
        p *= tl.exp(log_decay.to(tl.float32))
        m *= tl.exp((skipped - looped) * log_beta1)
    v *= tl.exp(skipped * log_beta2)
    return p, m, v


@triton.jit(do_not_specialize=["seed", "step"])
def row_adam_kernel(
    rows,
    gradients,
    num_rows,
    scale,
    table,
    remainder,
    exp_avg,
    exp_avg_sq,
    last_step,
    history,
    codes,
    scales,
    seed,
    step,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    root_beta2,
    log_beta1,
    log_beta2,
    eps,
    looped_steps,
    num_columns,
    row_stride,
    chunk_rows,
    ROUNDING: tl.constexpr,
    TABLE_TYPE: tl.constexpr,
    REMAINDER_TYPE: tl.constexpr,
    EXP_AVG_TYPE: tl.constexpr,
    EXP_AVG_SQ_TYPE: tl.constexpr,
    LAST_STEP_TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNKED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    if num_rows is not None:  # noqa: SIM102 - Triton decides this one when it compiles
        if index >= tl.load(num_rows):
            return
    row = index
    if rows is not None:
        row = tl.load(rows + index).to(tl.int64)
    # Of several programs for one row (repeated indices) the first to come here takes it; which one
    # that is makes no difference to the result.
    last_row = row_address(last_step, row, 1, chunk_rows, CHUNKED, False, LAST_STEP_TYPE)
    last = tl.atomic_xchg(last_row, step, sem="relaxed")
    skipped = step - last
    if gradients is not None:
        skipped -= 1
    elif skipped <= 0:
        return
    weights_row = row_address(table, row, row_stride, chunk_rows, CHUNKED, ALIGNED, TABLE_TYPE)
    m_row = row_address(exp_avg, row, num_columns, chunk_rows, CHUNKED, ALIGNED, EXP_AVG_TYPE)
    v_row = row_address(exp_avg_sq, row, num_columns, chunk_rows, CHUNKED, ALIGNED, EXP_AVG_SQ_TYPE)
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
        p = load_weights(weights_row + columns, remainder_row + columns, mask, ROUNDING)
        m = to_float(tl.load(m_row + columns, mask=mask, other=0))
        v = to_float(tl.load(v_row + columns, mask=mask, other=0))
        if gradients is not None:
            g = tl.load(gradients + index * num_columns + columns, mask=mask, other=0.0)
            g = g.to(tl.float32) * factor
        if skipped > 0:
            p, m, v = catch_up(
                p,
                m,
                v,
                last,
                skipped,
                history,
                beta1,
                root_beta2,
                log_beta1,
                log_beta2,
                eps,
                looped_steps,
            )
        if gradients is not None:
            entry = history + step.to(tl.int64) * 4
            decay = tl.load(entry).to(tl.float32)
            step_size = tl.load(entry + 1).to(tl.float32)
            correction = tl.load(entry + 2).to(tl.float32)
            m = m * beta1 + g * one_minus_beta1
            v = v * beta2 + g * g * one_minus_beta2
            p = p * decay - step_size * m / (tl.sqrt(v) * correction + eps)
        store_rounded(m_row + columns, m, mask)
        store_rounded(v_row + columns, v, mask)
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


def plan_row_adam(
    table,
    remainder,
    shadow,
    rounding,
    seed,
    step,
    gradient,
    scale,
    exp_avg,
    exp_avg_sq,
    last_step,
    history,
    beta1,
    beta2,
    eps,
    looped_steps,
) -> Launch:
    """AdamW's step on the gradient's rows, caught up first; see operators.py."""
    rows, gradients, _, num_rows = gradient
    return _plan(
        rows,
        len(rows),
        dict(
            gradients=gradients,
            num_rows=num_rows,
            scale=scale,
            seed=seed,
            step=step,
            history=history,
            ROUNDING=rounding,
        ),
        (table, remainder, shadow, exp_avg, exp_avg_sq, last_step),
        (beta1, beta2, eps, looped_steps),
    )


def plan_row_adam_catch_up(
    table,
    remainder,
    shadow,
    rounding,
    seed,
    step,
    rows,
    exp_avg,
    exp_avg_sq,
    last_step,
    history,
    beta1,
    beta2,
    eps,
    looped_steps,
) -> Launch:
    """Rows (None: all) caught up to `step`; see operators.py."""
    return _plan(
        rows,
        sum(map(len, table)) if rows is None else len(rows),
        dict(
            gradients=None,
            num_rows=None,
            scale=None,
            seed=seed,
            step=step,
            history=history,
            ROUNDING=rounding,
        ),
        (table, remainder, shadow, exp_avg, exp_avg_sq, last_step),
        (beta1, beta2, eps, looped_steps),
    )


def _elements_a_thread(table, updates: bool) -> int:
    """8, as registers allow; 16 for updates of wide rows, or one program would fill a processor."""
    return 16 if updates and table[0].shape[1] > _WIDE else 8


def _plan(rows, programs: int, arguments: dict, tensors: tuple, constants: tuple) -> Launch:
    table, remainder, shadow, exp_avg, exp_avg_sq, last_step = tensors
    beta1, beta2, eps, looped_steps = constants
    return Launch(
        kernel=row_adam_kernel,
        grid=(programs,),
        arguments=dict(
            rows=rows,
            **arguments,
            beta1=beta1,
            beta2=beta2,
            one_minus_beta1=1 - beta1,
            one_minus_beta2=1 - beta2,
            root_beta2=math.sqrt(beta2),
            log_beta1=math.log(beta1) if beta1 else -math.inf,
            log_beta2=math.log(beta2),
            eps=eps,
            looped_steps=looped_steps,
            **states(
                table=table,
                remainder=remainder,
                exp_avg=exp_avg,
                exp_avg_sq=exp_avg_sq,
                last_step=last_step,
            ),
            **cut(table, remainder, exp_avg, exp_avg_sq, shadow[:-1]),
            **fused_shadow(table, shadow),
        ),
        num_warps=warps(table, _elements_a_thread(table, arguments["gradients"] is not None)),
    )
