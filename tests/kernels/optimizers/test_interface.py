"""Tables and their chunks, clipping, checkpoints, errors, and the operators as torch sees them."""

import pytest
import torch

from memory_kernels import Fp8Shadow, RowGradients
from memory_kernels.optimizers import RowAdagrad, RowAdam, RowSGD, RowWiseAdagrad
from tests.devices import TEST_DEVICE
from tests.kernels.optimizers.cases import make_generator, make_gradient, make_table, to_dense

OPTIMIZERS = [RowSGD, RowAdagrad, RowWiseAdagrad, RowAdam]


def _run(optimizer, table, steps: int, seed: int = 0) -> None:
    generator = make_generator(seed)
    for _ in range(steps):
        optimizer.step(make_gradient(table, 4, generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_chunks_are_one_table(optimizer, dtype):
    table = make_table(11, 5, dtype)
    whole = torch.nn.Parameter(table.clone())
    chunks = [torch.nn.Parameter(chunk.clone()) for chunk in table.split(4)]
    optimizers = optimizer([whole]), optimizer([chunks])
    for each in optimizers:
        _run(each, table, 6)
        if optimizer is RowAdam:
            each.prepare(torch.tensor([10, 0, 3, 3], device=TEST_DEVICE))
    assert torch.equal(torch.cat([chunk.detach() for chunk in chunks]), whole.detach())
    masters = [torch.cat(each.master_weights()) for each in optimizers]
    assert torch.equal(*masters)


@pytest.mark.parametrize("master", ["exact", "stochastic", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_rows_keep_their_bits(optimizer, master):
    """NaN with a payload stands in all that belongs to rows which are not read."""
    table = make_table(9, 5, torch.bfloat16)
    table[2] = torch.nan
    shadow = Fp8Shadow.of(table)
    shadow.scales[2] = torch.nan
    opt = optimizer([{"params": [table], "shadow": shadow}], master=master)
    for name, state in opt.state[table].items():
        if state.shape[:1] == (9,) and name != "last_step":
            state[2] = torch.nan if state.is_floating_point() else 77
    everything = [table, *shadow.tensors(), *opt.state[table].values()]
    kept = [t for t in everything if t.shape[:1] == (9,)]
    before = [t[2].clone() for t in kept]
    rows = torch.tensor([0, 1, 3, 8], device=TEST_DEVICE)
    gradient = make_gradient(table, 4, make_generator())
    gradient.rows[:4] = rows
    opt.step(gradient)
    if optimizer is RowAdam:
        opt.prepare(rows)
    for tensor, row in zip(kept, before, strict=True):
        assert torch.equal(
            tensor[2:3].view(torch.uint8), row.reshape(tensor[2:3].shape).view(torch.uint8)
        )
    assert not table[rows].isnan().any()


def test_clipping_is_over_all_tables():
    tables = [torch.nn.Parameter(make_table(rows, 3)) for rows in (7, 5)]
    dense = [torch.nn.Parameter(table.detach().clone()) for table in tables]
    generator = make_generator()
    gradients = [make_gradient(table, 3, generator) for table in tables]
    for table, gradient in zip(dense, gradients, strict=True):
        table.grad = to_dense(gradient, table)
    wanted = torch.nn.utils.clip_grad_norm_(dense, 0.5)
    torch.optim.SGD(dense, lr=0.1).step()
    norm = RowSGD(tables, lr=0.1).step(gradients, max_norm=0.5)
    torch.testing.assert_close(norm, wanted)
    for ours, theirs in zip(tables, dense, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_below_the_norm_are_not_scaled_up():
    tables = [torch.nn.Parameter(make_table(7, 3)) for _ in range(2)]
    gradient = make_gradient(tables[0], 3, make_generator())
    RowSGD(tables[:1]).step(gradient, max_norm=1e6)
    RowSGD(tables[1:]).step(gradient)
    assert torch.equal(*tables)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scale_is_a_scaled_gradient(optimizer):
    tables = [torch.nn.Parameter(make_table(7, 3)) for _ in range(2)]
    gradient = make_gradient(tables[0], 3, make_generator())
    half = RowGradients(
        rows=gradient.rows,
        gradients=gradient.gradients / 2,
        squared_norms=gradient.squared_norms / 4,
        num_rows=gradient.num_rows,
    )
    optimizer(tables[:1]).step(gradient, scale=torch.tensor(0.5, device=TEST_DEVICE))
    optimizer(tables[1:]).step(half)
    assert torch.equal(*tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_from_a_saved_state_has_the_same_bits(optimizer, dtype, tmp_path):
    table = torch.nn.Parameter(make_table(9, 5, dtype))
    first = optimizer([table], lr=0.1)
    _run(first, table, 3)
    torch.save({"table": table, "optimizer": first.state_dict()}, tmp_path / "saved.pt")
    _run(first, table, 3, seed=1)
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    other = torch.nn.Parameter(saved["table"].detach().clone())
    second = optimizer([other], lr=0.7)
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["lr"] == 0.1
    _run(second, other, 3, seed=1)
    assert torch.equal(table, other)
    for name, state in first.state[table].items():
        assert torch.equal(state, second.state[other][name]), name
        assert state.dtype == second.state[other][name].dtype


def test_a_state_of_another_table_is_an_error():
    saved = RowAdam([make_table(9, 5)]).state_dict()
    with pytest.raises(ValueError, match="state_dict: exp_avg"):
        RowAdam([make_table(8, 5)]).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"state_dict: states \['sum'\]"):
        RowAdagrad([make_table(9, 5)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="state_dict: tables"):
        RowAdam([list(make_table(9, 5).split(5))]).load_state_dict(saved)


def test_each_table_has_its_own_options():
    tables = [make_table(7, 3), make_table(5, 4)]
    optimizer = RowSGD([{"params": tables[0], "lr": 0.0}, tables[1]], lr=0.5)
    before = [table.clone() for table in tables]
    generator = make_generator()
    optimizer.step([make_gradient(table, 3, generator) for table in tables])
    assert torch.equal(tables[0], before[0])
    assert not torch.equal(tables[1], before[1])
    optimizer.step([None, make_gradient(tables[1], 3, generator)])
    optimizer.zero_grad()


def test_gradients_that_hold_nothing_change_nothing():
    table = make_table(7, 3)
    before = table.clone()
    for optimizer in OPTIMIZERS:
        optimizer([table]).step(RowGradients.empty(table, 5), max_norm=1.0)
    assert torch.equal(table, before)


def _gradient_with(**changes) -> RowGradients:
    gradient = make_gradient(make_table(7, 3), 2, make_generator())
    return RowGradients(**{**vars(gradient), **changes})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: RowSGD(t), "tables: a list of tables"),
        (lambda t: RowSGD([t.half()]), "table: fp32, bf16 or fp64 wanted"),
        (lambda t: RowSGD([[t, t[:, :2].contiguous()]]), "table: chunks of one dtype"),
        (lambda t: RowSGD([t], master="fp32"), "master: exact, stochastic or None"),
        (lambda t: RowSGD([t], lr=-1.0), "lr: 0 or more"),
        (lambda t: RowAdagrad([t], eps=-1.0), "eps: 0 or more"),
        (lambda t: RowAdagrad([t], initial_accumulator_value=-1.0), "initial_accumulator_value"),
        (lambda t: RowAdam([t], betas=(1.0, 0.9)), "betas: in"),
        (lambda t: RowAdam([t], lr=2.0, weight_decay=0.5), "lr \\* weight_decay"),
        (lambda t: RowAdam([t], moments_dtype=torch.float16), "moments_dtype"),
        (lambda t: RowSGD([{"params": t, "shadow": Fp8Shadow.of(t[:2])}]), "shadow: values cut"),
        (lambda t: RowSGD([t, t.clone()]).step(_gradient_with()), "gradients: one for each of 2"),
        (
            lambda t: RowSGD([t]).step(_gradient_with(), max_norm=1.0, scale=torch.ones(())),
            "max_norm and scale",
        ),
        (
            lambda t: RowSGD([t]).step(make_gradient(make_table(7, 4), 2, make_generator())),
            "gradients: rows, gradients, squared norms",
        ),
        (
            lambda t: RowSGD([t]).step(_gradient_with(squared_norms=torch.zeros(1))),
            "gradients: rows, gradients, squared norms",
        ),
        (
            lambda t: RowSGD([t]).step(_gradient_with(rows=torch.zeros(5, dtype=torch.int32))),
            "gradients: int64 rows",
        ),
        (lambda t: RowSGD([t]).step(torch.ones_like(t)), "gradients: RowGradients wanted, got Ten"),
        (lambda t: RowSGD([t]).step(_gradient_with(), max_norm=-1.0), "max_norm: above 0"),
        (lambda t: RowSGD([{"params": t, "shadw": None}]), "shadw: no option.*shadow, lr, step"),
        (lambda t: RowSGD([{"lr": 1.0}]), "params: the dict of a table"),
        (lambda t: RowSGD([{"params": t, "shadow": t}]), "shadow: Fp8Shadow wanted, got Tensor"),
        (lambda t: RowAdam([t]).prepare([0]), "indices: Tensor wanted, got int"),
        (
            lambda t: RowAdam([t]).prepare(torch.zeros(1, device="meta").long()),
            "indices: on .*meta",
        ),
    ],
)
def test_errors_name_what_is_wrong(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(make_table(7, 3))


@pytest.mark.skipif(TEST_DEVICE != "cpu", reason="nothing waits for a GPU to look at values")
def test_rows_of_another_table_change_nothing():
    table = make_table(7, 3)
    before, optimizer = table.clone(), RowAdam([table])
    gradient = _gradient_with()
    gradient.rows[1] = 7
    with pytest.raises(IndexError, match=r"^gradients: rows: each in \[0, 7\) .* largest 7 "):
        optimizer.step(gradient)
    assert torch.equal(table, before)
    gradient.num_rows.fill_(1)  # what does not hold may be anything
    optimizer.step(gradient)
    with pytest.raises(IndexError, match="^indices: each in .* smallest -1"):
        optimizer.prepare(torch.tensor([3, -1]))


def test_schedulers_add_options():
    optimizer = RowSGD([make_table(7, 3)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step(None)
    scheduler.step()
    again = RowSGD([make_table(7, 3)])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == 0.5
    resumed = RowSGD([{"params": make_table(7, 3), "initial_lr": 1.0}])
    torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 0.5**step, last_epoch=2)


def test_betas_may_not_change():
    optimizer = RowAdam([make_table(7, 3)])
    optimizer.step(_gradient_with())
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    with pytest.raises(ValueError, match="betas and eps may not change"):
        optimizer.step(_gradient_with())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_operators_pass_opcheck(optimizer):
    table = make_table(7, 6, torch.bfloat16)
    opt = optimizer([{"params": [table], "shadow": Fp8Shadow.of(table)}])
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "memory_kernels":
                calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    with Recorder():
        opt.step(_gradient_with(gradients=torch.ones(5, 6, device=TEST_DEVICE)))
        if optimizer is RowAdam:
            opt.prepare(torch.tensor([1, 1, 3], device=TEST_DEVICE))
    assert calls
    for function, args, kwargs in calls:
        torch.library.opcheck(function, args, kwargs)
