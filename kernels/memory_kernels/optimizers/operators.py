"""The updates as torch.library operators.

Axes: S rows of the table, D columns, C capacity of the gradient. Tables and states come as row
chunks, all cut alike. Operands of every operator:

| operand | is |
|---|---|
| `table` | chunks of [S, D]: fp32, bf16 (or fp64, which only torch's path takes) |
| `remainder` | with the rounding `exact`, chunks of [S, D] int16: see precision.py; else empty |
| `shadow` | empty, or the fp8 values (as uint8 chunks) and last their scales [S] fp32 |
| `rounding` | `exact`, `stochastic` or `nearest` |
| `seed`, `step` | of the random bits; `step` also counts Adam's steps |
| `gradient` | the buffers of a `RowGradients` |
| `scale` | [1] fp32 on the device, which the gradient is multiplied by; or None |

Only the rows of the gradient change, in table, remainder, states and shadow; all others keep their
bits. On Triton nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.choice import uses_triton
from memory_kernels.optimizers import torch_ops

_WEIGHTS = ("table", "remainder", "shadow")


def _implementation(table: Sequence[Tensor]):
    if not uses_triton(table[0]):
        return torch_ops
    from memory_kernels.optimizers import triton_ops  # needs triton, which not every machine has

    return triton_ops


@torch.library.custom_op("memory_kernels::row_sgd", mutates_args=_WEIGHTS)
def row_sgd(
    table: Sequence[Tensor],
    remainder: Sequence[Tensor],
    shadow: Sequence[Tensor],
    rounding: str,
    seed: int,
    step: int,
    gradient: Sequence[Tensor],
    scale: Tensor | None,
    lr: float,
) -> None:
    """table -= lr * gradient."""
    _implementation(table).row_sgd(
        table, remainder, shadow, rounding, seed, step, gradient, scale, lr
    )


@torch.library.custom_op("memory_kernels::row_adagrad", mutates_args=(*_WEIGHTS, "sums"))
def row_adagrad(
    table: Sequence[Tensor],
    remainder: Sequence[Tensor],
    shadow: Sequence[Tensor],
    rounding: str,
    seed: int,
    step: int,
    gradient: Sequence[Tensor],
    scale: Tensor | None,
    sums: Sequence[Tensor],
    lr: float,
    eps: float,
) -> None:
    """sums [S, D] += gradient^2; table -= lr * gradient / (sqrt(sums) + eps)."""
    _implementation(table).row_adagrad(
        table, remainder, shadow, rounding, seed, step, gradient, scale, sums, lr, eps
    )


@torch.library.custom_op("memory_kernels::row_wise_adagrad", mutates_args=(*_WEIGHTS, "sums"))
def row_wise_adagrad(
    table: Sequence[Tensor],
    remainder: Sequence[Tensor],
    shadow: Sequence[Tensor],
    rounding: str,
    seed: int,
    step: int,
    gradient: Sequence[Tensor],
    scale: Tensor | None,
    sums: Sequence[Tensor],
    lr: float,
    eps: float,
) -> None:
    """sums [S] += mean over columns of gradient^2; table -= lr * gradient / (sqrt(sums) + eps)."""
    _implementation(table).row_wise_adagrad(
        table, remainder, shadow, rounding, seed, step, gradient, scale, sums, lr, eps
    )


_MOMENTS = ("exp_avg", "exp_avg_sq", "last_step")


@torch.library.custom_op("memory_kernels::row_adam", mutates_args=(*_WEIGHTS, *_MOMENTS))
def row_adam(
    table: Sequence[Tensor],
    remainder: Sequence[Tensor],
    shadow: Sequence[Tensor],
    rounding: str,
    seed: int,
    step: int,
    gradient: Sequence[Tensor],
    scale: Tensor | None,
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    last_step: Sequence[Tensor],
    history: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    looped_steps: int,
) -> None:
    """Catch up the gradient's rows to step - 1 and take AdamW's step with it; see adam.py."""
    _implementation(table).row_adam(
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
    )


@torch.library.custom_op("memory_kernels::row_adam_catch_up", mutates_args=(*_WEIGHTS, *_MOMENTS))
def row_adam_catch_up(
    table: Sequence[Tensor],
    remainder: Sequence[Tensor],
    shadow: Sequence[Tensor],
    rounding: str,
    seed: int,
    step: int,
    rows: Tensor | None,
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    last_step: Sequence[Tensor],
    history: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    looped_steps: int,
) -> None:
    """Catch up rows (any order, repeated or not; None: all) to `step`; see adam.py."""
    _implementation(table).row_adam_catch_up(
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
    )
