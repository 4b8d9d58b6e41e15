"""The row-sparse optimizers against torch's own on the whole table."""

import copy

import pytest
import torch

from memory_kernels.optimizers import RowAdagrad, RowAdam, RowSGD, RowWiseAdagrad
from memory_kernels.optimizers.adam import looped_steps
from tests.kernels.optimizers.cases import make_generator, make_gradient, make_table, to_dense

ROWS, COLUMNS = 23, 5
DTYPES = [torch.float64, torch.float32]


def _close(ours, dense, steps: int) -> None:
    """Apart by a few roundings of each step, to values of order one."""
    tolerance = 4 * steps * torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, dense, rtol=tolerance, atol=tolerance)


def _pair(make_ours, make_dense, dtype):
    table = make_table(ROWS, COLUMNS, dtype)
    ours, dense = (torch.nn.Parameter(table.clone()) for _ in range(2))
    return ours, make_ours([ours]), dense, make_dense([dense])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (RowSGD, torch.optim.SGD),
        (RowAdagrad, torch.optim.Adagrad),
        (
            lambda tables, lr: RowAdagrad(tables, lr, 0.3, initial_accumulator_value=0.1),
            lambda tables, lr: torch.optim.Adagrad(
                tables, lr, eps=0.3, initial_accumulator_value=0.1
            ),
        ),
    ],
    ids=["SGD", "Adagrad", "Adagrad with eps"],
)
def test_rows_not_read_do_not_move_in_these(ours, theirs, dtype):
    table, optimizer, dense, reference = _pair(
        lambda t: ours(t, lr=0.1), lambda t: theirs(t, lr=0.1), dtype
    )
    generator = make_generator()
    for _ in range(30):
        gradient = make_gradient(table, 6, generator)
        dense.grad = to_dense(gradient, dense)
        reference.step()
        optimizer.step(gradient)
    _close(table.detach(), dense.detach(), 30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_wise_adagrad_is_its_formula(dtype):
    table, optimizer, dense, _ = _pair(
        lambda t: RowWiseAdagrad(t, lr=0.1, eps=1e-3), lambda t: None, dtype
    )
    sums = torch.zeros(ROWS, 1, dtype=dtype, device=table.device)
    generator = make_generator()
    for _ in range(10):
        gradient = make_gradient(table, 6, generator)
        grad = to_dense(gradient, dense)
        sums += grad.square().mean(-1, keepdim=True)
        with torch.no_grad():
            dense -= 0.1 * grad / (sums.sqrt() + 1e-3)
        optimizer.step(gradient)
    # The norms in RowGradients are fp32 for every table.
    torch.testing.assert_close(table, dense, rtol=1e-5, atol=1e-5)


ADAM_OPTIONS = {
    "usual": dict(),
    "no decay": dict(weight_decay=0.0),
    "large eps": dict(eps=0.5, weight_decay=0.3),
    "slow second moment": dict(betas=(0.9, 0.95)),
    "momentum outlasts the second moment": dict(betas=(0.97, 0.9), eps=1e-2),
    "no momentum": dict(betas=(0.0, 0.9), weight_decay=0.1),
}


@pytest.mark.parametrize(
    "dtype, prepared", [(torch.float64, True), (torch.float64, False), (torch.float32, True)]
)
@pytest.mark.parametrize("options", ADAM_OPTIONS.values(), ids=ADAM_OPTIONS)
def test_adam_is_dense_adamw(options, dtype, prepared):
    """Also in what every forward reads: the rows that were prepared."""
    table, optimizer, dense, reference = _pair(
        lambda t: RowAdam(t, lr=0.02, **options),
        lambda t: torch.optim.AdamW(t, lr=0.02, **options),
        dtype,
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(each, lambda step: (step % 7) / 3)
        for each in (optimizer, reference)
    ]
    generator = make_generator()
    for number in range(40):
        gradient = make_gradient(table, 3, generator)
        if prepared:
            rows = gradient.trimmed().rows
            optimizer.prepare(torch.cat((rows, rows.flip(0)))[None].int())
            _close(table.detach()[rows], dense.detach()[rows], number + 1)
        dense.grad = to_dense(gradient, dense)
        reference.step()
        optimizer.step(gradient)
        for schedule in schedules:
            schedule.step()
    assert not torch.equal(table, dense)  # rows are behind
    optimizer.flush()
    _close(table.detach(), dense.detach(), 40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_adam_leaves_out_after_the_looped_steps_is_below_the_stated_bound(dtype):
    """One read, then many more missed steps than are gone through one by one; the rate rises
    tenfold after these."""
    betas = (0.8, 0.9)
    steps = 3 * looped_steps(*betas)
    options = dict(lr=0.05, betas=betas, weight_decay=0.1, eps=1e-12)
    table, optimizer, dense, reference = _pair(
        lambda t: RowAdam(t, **options), lambda t: torch.optim.AdamW(t, **options), dtype
    )
    generator = make_generator()
    gradient = make_gradient(table, 4, generator)
    dense.grad = to_dense(gradient, dense)
    for number in range(steps):
        if number == looped_steps(*betas):
            for each in (optimizer, reference):
                each.param_groups[0]["lr"] *= 10
        reference.step()
        dense.grad = torch.zeros_like(dense)
        optimizer.step(gradient if number == 0 else None)
    moment, square = (0.2 * to_dense(gradient, dense)).abs(), 0.1 * to_dense(gradient, dense) ** 2
    optimizer.flush()
    bound = 2**-24 * 0.5 * moment / square.sqrt().clamp(min=1e-30)
    rounding = 4 * torch.finfo(dtype).eps * (1 if dtype == torch.float64 else steps)
    assert ((table - dense).abs() <= bound + rounding).all()
    for name in ("exp_avg", "exp_avg_sq"):
        states = optimizer.state[table][name], reference.state[dense][name]
        torch.testing.assert_close(*states, rtol=1e-3, atol=0)
    if dtype == torch.float64:
        assert (table - dense).abs().max() > 0  # it is this bound that was met, not equality


def test_looped_steps_are_the_least_number_within_the_bound():
    for beta1, beta2 in ((0.9, 0.999), (0.9, 0.95), (0.5, 0.99)):
        rho, number = beta1 / beta2**0.5, looped_steps(beta1, beta2)
        assert rho**number / (1 - rho) <= 2**-24 < rho ** (number - 1) / (1 - rho)
    assert looped_steps(0.9, 0.999) == 181
    assert looped_steps(0.99, 0.9) == 2**31 - 1


def test_sparse_adam_has_the_same_first_step():
    """torch's SparseAdam leaves rows behind for good; in the first step none is."""
    table, optimizer, dense, reference = _pair(
        lambda t: RowAdam(t, weight_decay=0.0),
        lambda t: torch.optim.SparseAdam(t),
        torch.float32,
    )
    gradient = make_gradient(table, 6, make_generator())
    dense.grad = gradient.to_sparse(dense)
    reference.step()
    optimizer.step(gradient)
    _close(table.detach(), dense.detach(), 1)


def test_history_grows_with_the_steps():
    table, optimizer, dense, reference = _pair(
        lambda t: RowAdam(t, lr=1e-3), lambda t: torch.optim.AdamW(t, lr=1e-3), torch.float64
    )
    gradient = make_gradient(table, 4, make_generator())
    for number in range(1100):
        due = number in (0, 1060)
        dense.grad = to_dense(gradient, dense) if due else torch.zeros_like(dense)
        reference.step()
        optimizer.step(gradient if due else None)
    optimizer.flush()
    torch.testing.assert_close(table, dense, rtol=1e-7, atol=1e-9)


def test_several_gradients_of_a_table_are_summed():
    tables = [torch.nn.Parameter(make_table(ROWS, COLUMNS)) for _ in range(2)]
    generator = make_generator()
    parts = [make_gradient(tables[0], 5, generator) for _ in range(3)]
    RowSGD([tables[0]], lr=0.1).step([parts])
    with torch.no_grad():
        tables[1] -= 0.1 * sum(to_dense(part, tables[1]) for part in parts)
    _close(tables[0].detach(), tables[1].detach(), 3)


def test_a_copied_optimizer_goes_on_alone():
    table = torch.nn.Parameter(make_table(ROWS, COLUMNS))
    optimizer = RowAdam([table])
    twin = copy.deepcopy(optimizer)
    before = table.detach().clone()
    gradient = make_gradient(table, 4, make_generator())
    twin.step(gradient)
    assert torch.equal(table, before)
    optimizer.step(gradient)
    assert torch.equal(table, twin.param_groups[0]["params"][0])
