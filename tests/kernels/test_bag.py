"""weighted_bag and row_dot against their definitions: outputs, every gradient, edges and errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from memory_kernels import row_dot, weighted_bag
from memory_kernels.bag.reference import row_dot_reference, weighted_bag_reference
from tests.kernels.bag_cases import (
    DTYPES,
    INDEX_DTYPES,
    SHAPES,
    Case,
    Shape,
    assert_rounded,
    make_case,
)

PATTERNS = ["random", "one row", "same bag"]


def _gradients(output: torch.Tensor, upstream: torch.Tensor, *inputs: torch.Tensor):
    return torch.autograd.grad(output, inputs, upstream)


def _exact_with_magnitude(function, case: Case, names: tuple[str, ...], upstream: torch.Tensor):
    """Output and gradients in fp64, each with the same sums over absolute values."""
    results = []
    for transform in (torch.Tensor.double, torch.Tensor.abs):
        exact = case.exact()
        inputs = [transform(getattr(exact, n).detach()).requires_grad_() for n in names]
        table, operand = inputs
        output = function(table, exact.indices, operand)
        gradients = _gradients(output, transform(upstream.double()), *inputs)
        results.append((output.detach(), *gradients))
    return zip(*results, strict=True)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bag_equals_definition(shape: Shape, dtype, index_dtype, pattern: str):
    case = make_case(shape, dtype, index_dtype, pattern)
    upstream = case.x.detach()
    y = weighted_bag(case.table, case.indices, case.weights)
    assert y.dtype == dtype
    ours = (y, *_gradients(y, upstream, case.table, case.weights))
    assert [g.dtype for g in ours] == [dtype] * 3
    wanted = _exact_with_magnitude(weighted_bag_reference, case, ("table", "weights"), upstream)
    terms = (shape.bag, shape.tokens * shape.bag, shape.columns)
    names = ("y", "gradient of table", "gradient of weights")
    for name, tensor, (exact, magnitude), n in zip(names, ours, wanted, terms, strict=True):
        assert_rounded(name, tensor, exact, magnitude, n)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_row_dot_equals_definition(shape: Shape, dtype, index_dtype, pattern: str):
    case = make_case(shape, dtype, index_dtype, pattern)
    upstream = case.weights.detach()
    h = row_dot(case.table, case.indices, case.x)
    ours = (h, *_gradients(h, upstream, case.table, case.x))
    assert [g.dtype for g in ours] == [dtype] * 3
    wanted = _exact_with_magnitude(row_dot_reference, case, ("table", "x"), upstream)
    terms = (shape.columns, shape.tokens * shape.bag, shape.bag)
    names = ("h", "gradient of table", "gradient of x")
    for name, tensor, (exact, magnitude), n in zip(names, ours, wanted, terms, strict=True):
        assert_rounded(name, tensor, exact, magnitude, n)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gate_multiplies_by_silu(shape: Shape):
    ours, wanted = make_case(shape, torch.float64), make_case(shape, torch.float64)
    y = weighted_bag(ours.table, ours.indices, ours.weights, ours.gate)
    expected = weighted_bag_reference(wanted.table, wanted.indices, wanted.weights)
    expected = expected * wanted.gate / (1 + torch.exp(-wanted.gate))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(ours.x.detach())
    expected.backward(wanted.x.detach())
    for name in ("table", "weights", "gate"):
        exact = getattr(wanted, name).grad
        torch.testing.assert_close(getattr(ours, name).grad, exact, rtol=1e-11, atol=1e-11)


def test_output_keeps_the_tables_dtype_whatever_the_gates():
    case = make_case(SHAPES[1], torch.bfloat16)
    gate = case.gate.detach().float()
    y = weighted_bag(case.table, case.indices, case.weights.detach().float(), gate)
    assert y.dtype == torch.bfloat16
    expected = weighted_bag(case.table, case.indices, case.weights).float() * F.silu(gate)
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
def test_gradcheck(index_dtype):
    case = make_case(Shape(tokens=4, bag=3, rows=5, columns=3), torch.float64, index_dtype)
    bag = lambda table, weights, gate: weighted_bag(table, case.indices, weights, gate)  # noqa: E731
    assert torch.autograd.gradcheck(bag, (case.table, case.weights, case.gate))
    dot = lambda table, x: row_dot(table, case.indices, x)  # noqa: E731
    assert torch.autograd.gradcheck(dot, (case.table, case.x))


@pytest.mark.parametrize("tokens, bag", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_read(tokens: int, bag: int):
    case = make_case(Shape(tokens=tokens, bag=bag, rows=5, columns=3))
    y = weighted_bag(case.table, case.indices, case.weights, case.gate)
    h = row_dot(case.table, case.indices, case.x)
    assert (y.shape, h.shape) == ((tokens, 3), (tokens, bag))
    assert not y.any()
    (y.sum() + h.sum()).backward()
    assert torch.equal(case.table.grad, torch.zeros(5, 3))
    assert case.weights.grad.shape == (tokens, bag)
    assert torch.equal(case.x.grad, torch.zeros(tokens, 3))


def test_table_without_columns():
    case = make_case(Shape(tokens=3, bag=2, rows=4, columns=0))
    weighted_bag(case.table, case.indices, case.weights).sum().backward()
    assert case.table.grad.shape == (4, 0)
    assert torch.equal(case.weights.grad, torch.zeros(3, 2))
    main_grad = torch.zeros(4, 0)
    h = row_dot(case.table, case.indices, case.x, main_grad=main_grad)
    h.sum().backward()
    assert torch.equal(h, torch.zeros(3, 2))
    assert case.x.grad.shape == (3, 0)


def test_rows_that_nobody_reads_do_not_matter():
    case = make_case(Shape(tokens=6, bag=3, rows=40, columns=5))
    unread = torch.ones(40, dtype=torch.bool)
    unread[case.indices.flatten()] = False
    assert unread.any()
    poisoned = case.table.detach().clone()
    poisoned[unread] = float("nan")
    for operator, operand in ((weighted_bag, case.weights), (row_dot, case.x)):
        results = []
        for values in (case.table.detach(), poisoned):
            table = values.clone().requires_grad_()
            output = operator(table, case.indices, operand)
            gradients = _gradients(output, torch.ones_like(output), table, operand)
            results.append((output.detach(), *gradients))
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)
        assert not results[0][1][unread].any()


def test_bf16_sums_are_accumulated_in_fp32():
    """Ones added in bf16 stop at 256, where the next number is 258."""
    many = 1024
    table = torch.ones(1, many, dtype=torch.bfloat16, requires_grad=True)
    x = torch.ones(many, many, dtype=torch.bfloat16)
    indices = torch.zeros(many, 1, dtype=torch.int64)
    assert weighted_bag(table, indices.T, torch.ones(1, many).bfloat16()).eq(many).all()
    h = row_dot(table, indices, x)
    assert h.eq(many).all()
    h.sum().backward()
    assert table.grad.eq(many).all()


def test_layouts_of_memory_do_not_matter():
    case = make_case(Shape(tokens=6, bag=4, rows=10, columns=8))
    strided = {
        "table": torch.cat((case.table.detach(), torch.full((10, 5), math.nan)), 1)[:, :8],
        "indices": case.indices.T.contiguous().T,
        "weights": case.weights.detach().T.contiguous().T,
        "x": case.x.detach().T.contiguous().T,
    }
    assert not any(tensor.is_contiguous() for tensor in strided.values())
    for operator, name in ((weighted_bag, "weights"), (row_dot, "x")):
        results = []
        for values in (vars(case), strided):
            table, operand = values["table"].detach(), values[name].detach()
            table.requires_grad_(), operand.requires_grad_()
            output = operator(table, values["indices"], operand)
            results.append((output.detach(), *_gradients(output, output.detach(), table, operand)))
        for plain, other in zip(*results, strict=True):
            torch.testing.assert_close(plain, other)


def test_a_table_of_strided_columns_is_refused():
    """A contiguous copy of a large table at every call would be a silent disaster."""
    case = make_case(Shape(tokens=6, bag=4, rows=10, columns=8))
    with pytest.raises(ValueError, match=r"^table: contiguous columns wanted.*\.contiguous\(\)"):
        weighted_bag(case.table.detach().T.contiguous().T, case.indices, case.weights)


def test_upstream_gradient_may_be_expanded():
    case = make_case(SHAPES[1])
    weighted_bag(case.table, case.indices, case.weights).sum().backward()
    exact = case.exact()
    weighted_bag_reference(exact.table, exact.indices, exact.weights).sum().backward()
    torch.testing.assert_close(case.table.grad.double(), exact.table.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", ["table", "indices", "weights", "gate", "main_grad"])
@pytest.mark.parametrize("problem", ["shape", "dimensions", "dtype"])
def test_bag_names_the_wrong_argument(wrong: str, problem: str):
    case = make_case(SHAPES[1])
    arguments = dict(vars(case), main_grad=torch.zeros_like(case.table))
    del arguments["x"]
    arguments[wrong] = _spoil(arguments[wrong], problem)
    if (wrong, problem) == ("table", "shape"):
        wrong = "gate"  # a table's own shape is free; what no longer fits it is named
        arguments["main_grad"] = torch.zeros_like(arguments["table"])
    elif (wrong, problem) == ("indices", "shape"):
        wrong = "weights"
    with pytest.raises(ValueError, match=rf"^{wrong}: .* wanted, got \[.*\] torch\."):
        weighted_bag(**arguments)


@pytest.mark.parametrize("wrong", ["table", "indices", "x", "main_grad"])
@pytest.mark.parametrize("problem", ["dimensions", "dtype"])
def test_row_dot_names_the_wrong_argument(wrong: str, problem: str):
    case = make_case(SHAPES[1])
    arguments = dict(vars(case), main_grad=torch.zeros_like(case.table))
    del arguments["weights"], arguments["gate"]
    arguments[wrong] = _spoil(arguments[wrong], problem)
    with pytest.raises(ValueError, match=rf"^{wrong}: .* wanted, got \[.*\] torch\."):
        row_dot(**arguments)


def _spoil(tensor: torch.Tensor, problem: str) -> torch.Tensor:
    if problem == "shape":
        return torch.cat((tensor, tensor), dim=-1).detach()
    if problem == "dimensions":
        return tensor.detach()[None]
    return tensor.detach().to(torch.int16)
