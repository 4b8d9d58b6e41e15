"""The updates on torch operators: the CPU's path, and what the kernels are compared with.

The functions are the operators of operators.py, which says what the operands are. They wait for the
device where they look at how many rows there are.
"""

import torch
from torch import Tensor

from memory_kernels.optimizers.torch_weights import Weights

_ROWS_AT_ONCE = 1 << 16  # the copies of so many rows are small beside any table


def _held(gradient, scale, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows that hold, and their gradients times the scale in `dtype`."""
    rows, gradients, _, num_rows = gradient
    count = int(num_rows)
    held = gradients[:count].to(dtype)
    return rows[:count], held if scale is None else held * scale.to(dtype)


def _compute_dtype(table) -> torch.dtype:
    return torch.promote_types(table[0].dtype, torch.float32)


def row_sgd(table, remainder, shadow, rounding, seed, step, gradient, scale, lr) -> None:
    rows, gradients = _held(gradient, scale, _compute_dtype(table))

    def change(weights, number, local, part):
        weights -= gradients[part] * lr

    Weights(table, remainder, shadow, rounding, seed, step).update(rows, change)


def row_adagrad(
    table, remainder, shadow, rounding, seed, step, gradient, scale, sums, lr, eps
) -> None:
    rows, gradients = _held(gradient, scale, _compute_dtype(table))

    def change(weights, number, local, part):
        g = gradients[part]
        total = sums[number][local] + g * g
        sums[number][local] = total
        weights -= lr * g / (total.sqrt() + eps)

    Weights(table, remainder, shadow, rounding, seed, step).update(rows, change)


def row_wise_adagrad(
    table, remainder, shadow, rounding, seed, step, gradient, scale, sums, lr, eps
) -> None:
    rows, gradients = _held(gradient, scale, _compute_dtype(table))
    means = gradient[2][: len(rows)].to(gradients.dtype) / gradients.shape[1]
    if scale is not None:
        means *= scale.to(means.dtype).square()

    def change(weights, number, local, part):
        total = sums[number][local] + means[part]
        sums[number][local] = total
        weights -= (lr / (total.sqrt() + eps))[:, None] * gradients[part]

    Weights(table, remainder, shadow, rounding, seed, step).update(rows, change)


def row_adam(
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
) -> None:
    dtype = _compute_dtype(table)
    rows, gradients = _held(gradient, scale, dtype)
    decay, step_size, correction, _ = history[step].tolist()

    def change(weights, number, local, part):
        last = last_step[number][local]
        m, v = exp_avg[number][local].to(dtype), exp_avg_sq[number][local].to(dtype)
        catch_up_rows(weights, m, v, last, step - 1, history, beta1, beta2, eps, looped_steps)
        g = gradients[part]
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + g * g * (1 - beta2)
        weights *= decay
        weights -= step_size * m / (v.sqrt() * correction + eps)
        exp_avg[number][local] = m.to(exp_avg[number].dtype)
        exp_avg_sq[number][local] = v.to(exp_avg_sq[number].dtype)
        last_step[number][local] = step

    Weights(table, remainder, shadow, rounding, seed, step).update(rows, change)


def row_adam_catch_up(
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
) -> None:
    dtype = _compute_dtype(table)
    behind = torch.cat(list(last_step)) < step
    if rows is not None:
        read = torch.zeros_like(behind)
        read[rows] = True
        behind &= read

    def change(weights, number, local, part):
        last = last_step[number][local]
        m, v = exp_avg[number][local].to(dtype), exp_avg_sq[number][local].to(dtype)
        catch_up_rows(weights, m, v, last, step, history, beta1, beta2, eps, looped_steps)
        exp_avg[number][local] = m.to(exp_avg[number].dtype)
        exp_avg_sq[number][local] = v.to(exp_avg_sq[number].dtype)
        last_step[number][local] = step

    weights = Weights(table, remainder, shadow, rounding, seed, step)
    for some in behind.nonzero()[:, 0].split(_ROWS_AT_ONCE):
        weights.update(some, change)


def catch_up_rows(
    weights: Tensor,
    m: Tensor,
    v: Tensor,
    last: Tensor,
    step: int,
    history: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    looped_steps: int,
) -> None:
    """Bring rows [R, D] from the steps `last` [R] to `step`, in place; see adam.py."""
    skipped = (step - last).clamp(min=0).long()
    moving = (m != 0).any(-1)
    looped = torch.where(moving, skipped.clamp(max=looped_steps), 0)
    # The rows with the most steps first: those that are still in the loop are the first ones.
    order = looped.argsort(descending=True, stable=True)
    ends = looped[order]
    p, momentum, root = weights[order], m[order], v[order].sqrt()
    entries = last.long()[order]
    for number in range(1, int(looped.max()) + 1 if len(looped) else 1):
        active = int((ends >= number).sum())
        scalars = history[entries[:active] + number].to(p.dtype)
        decay, step_size, correction = scalars[:, :3].T.unsqueeze(-1)
        momentum[:active] *= beta1
        root[:active] *= beta2**0.5
        p[:active] *= decay
        p[:active] -= step_size * momentum[:active] / (root[:active] * correction + eps)
    rest = skipped[order] - ends
    logs = history[:, 3]
    p *= (logs[entries + skipped[order]] - logs[entries + ends]).exp().to(p.dtype)[:, None]
    momentum *= (beta1 ** rest.double()).to(p.dtype)[:, None]
    weights[order] = p
    m[order] = momentum
    v *= (beta2 ** skipped.double()).to(p.dtype)[:, None]
