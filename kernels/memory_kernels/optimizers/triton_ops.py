"""The updates on Triton; the same functions as torch_ops.py has. Nothing waits for the device."""

from memory_kernels.optimizers.triton_adagrad import plan_row_adagrad
from memory_kernels.optimizers.triton_adam import plan_row_adam, plan_row_adam_catch_up
from memory_kernels.optimizers.triton_sgd import plan_row_sgd
from memory_kernels.optimizers.triton_weights import shadow_launches


def _run(plan, table, remainder, shadow, *others, rows, num_rows) -> None:
    if table[0].shape[1] == 0:
        return
    plan(table, remainder, shadow, *others).run()
    for launch in shadow_launches(table, shadow, rows, num_rows):
        launch.run()


def row_sgd(table, remainder, shadow, rounding, seed, step, gradient, *others) -> None:
    rows, _, _, num_rows = gradient
    operands = (table, remainder, shadow, rounding, seed, step, gradient, *others)
    _run(plan_row_sgd, *operands, rows=rows, num_rows=num_rows)


def row_adagrad(table, remainder, shadow, rounding, seed, step, gradient, *others) -> None:
    rows, _, _, num_rows = gradient
    operands = (table, remainder, shadow, rounding, seed, step, gradient, *others)
    _run(plan_row_adagrad, *operands, rows=rows, num_rows=num_rows)


row_wise_adagrad = row_adagrad  # the shape of the sums says which


def row_adam(table, remainder, shadow, rounding, seed, step, gradient, *others) -> None:
    rows, _, _, num_rows = gradient
    operands = (table, remainder, shadow, rounding, seed, step, gradient, *others)
    _run(plan_row_adam, *operands, rows=rows, num_rows=num_rows)


def row_adam_catch_up(table, remainder, shadow, rounding, seed, step, rows, *others) -> None:
    operands = (table, remainder, shadow, rounding, seed, step, rows, *others)
    _run(plan_row_adam_catch_up, *operands, rows=rows, num_rows=None)
