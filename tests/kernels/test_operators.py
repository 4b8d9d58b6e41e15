"""The bag's operators as torch sees them: opcheck, torch.compile in every form, gradcheck."""

import pytest
import torch

from memory_kernels import Fp8Shadow, RowGradients, row_dot, weighted_bag
from memory_kernels.bag.reference import row_dot_reference, weighted_bag_reference
from tests.kernels.bag_cases import Case, Shape, make_case

SHAPE = Shape(tokens=6, bag=3, rows=20, columns=5)
FORMS = ["dense", "main_grad", "rows"]
OPERATORS = torch.ops.memory_kernels
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = [
    *((weighted_bag, form, gated) for form in FORMS for gated in (False, True)),
    *((row_dot, form, False) for form in FORMS),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Each test is another program to torch.compile, which counts how often it compiles one."""
    torch.compiler.reset()


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_()


def _sinks(form: str, case: Case) -> list[torch.Tensor]:
    if form == "main_grad":
        return [torch.zeros(10, SHAPE.columns), torch.zeros(10, SHAPE.columns)]
    return RowGradients.empty(case.table, 18).buffers() if form == "rows" else []


def _table(form: str, case: Case) -> list[torch.Tensor]:
    """Two chunks; the table takes no gradient from autograd where it has another destination."""
    return [c.detach().clone().requires_grad_(form == "dense") for c in case.table.split(10)]


def _check(operator, *arguments, checks: tuple[str, ...] = CHECKS) -> None:
    results = torch.library.opcheck(operator, arguments, test_utils=checks)
    assert results == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("with_shadow", [False, True], ids=["table", "shadow"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_bag(form: str, gated: bool, with_shadow: bool):
    case = make_case(SHAPE)
    table = _table(form, case)
    shadow = Fp8Shadow.of([c.detach() for c in table]).tensors() if with_shadow else []
    gate = case.gate if gated else None
    arguments = table, case.indices, case.weights, gate, shadow, form, _sinks(form, case)
    # torch compares the arguments before and after in a way that fp8 tensors do not have.
    checks = CHECKS[1:] if with_shadow else CHECKS
    _check(OPERATORS.weighted_bag, *arguments, checks=checks)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_row_dot(form: str):
    case = make_case(SHAPE)
    _check(
        OPERATORS.row_dot, _table(form, case), case.indices, case.x, [], form, _sinks(form, case)
    )


@pytest.mark.parametrize("with_dot", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_backward(form: str, with_dot: bool):
    case = make_case(SHAPE)
    table = [chunk.detach() for chunk in _table(form, case)]
    sinks = _sinks(form, case) or [torch.zeros_like(chunk) for chunk in table]
    operands = case.indices, case.weights.detach(), case.x.detach()
    _check(OPERATORS.bag_backward, table, *operands, [], form, sinks, with_dot)


@pytest.mark.parametrize("transposed", [None, 0, 2], ids=["contiguous", "upstream", "gate"])
def test_opcheck_of_the_gate(transposed: int | None):
    case = make_case(SHAPE)
    operands = [
        case.x.detach(),
        case.weights.detach() @ case.table[:3].detach(),
        case.gate.detach(),
    ]
    if transposed is not None:  # in memory only
        operands[transposed] = operands[transposed].T.contiguous().T
    _check(OPERATORS.gate_backward, *operands)


@pytest.mark.parametrize("operator, form, gated", CASES)
def test_compiled_equals_eager(operator, form: str, gated: bool):
    case = make_case(SHAPE)

    def step(table, indices, operand, gate, main_grad, held):
        gates = {} if gate is None else {"gate": gate * 2}
        y = operator(table, indices, operand * 2, main_grad=main_grad, row_gradients=held, **gates)
        return y.square() + 1

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        table, operand = _leaf(case.table), _leaf(case.weights)
        if operator is row_dot:
            operand = _leaf(case.x)
        gate = _leaf(case.gate) if gated else None
        main_grad = torch.ones(SHAPE.rows, SHAPE.columns) if form == "main_grad" else None
        held = RowGradients.empty(table, case.indices.numel()) if form == "rows" else None
        for _ in range(2):  # the second call adds to the same main_grad
            output = function(table, case.indices, operand, gate, main_grad, held)
            output.sum().backward()
        gradient = main_grad if held is None else held.to_sparse(table).to_dense()
        gradient = table.grad if form == "dense" else gradient
        results.append((output.detach(), operand.grad, gradient, *([gate.grad] if gated else [])))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert not torch.equal(results[0][2], torch.ones_like(results[0][2]))


def test_compiled_for_any_number_of_tokens():
    compiled = torch.compile(weighted_bag, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (4, 7, 5):
        case = make_case(Shape(tokens=tokens, bag=3, rows=20, columns=5))
        y = compiled(case.table, case.indices, case.weights, case.gate)
        y.backward(case.x.detach())
        expected = make_case(Shape(tokens=tokens, bag=3, rows=20, columns=5))
        weighted_bag(expected.table, expected.indices, expected.weights, expected.gate).backward(
            expected.x.detach()
        )
        for name in ("table", "weights", "gate"):
            assert torch.equal(getattr(case, name).grad, getattr(expected, name).grad)


@pytest.mark.parametrize(
    "bag, dot",
    [(weighted_bag, row_dot), (weighted_bag_reference, row_dot_reference)],
    ids=["operators", "references"],
)
def test_gradcheck(bag, dot):
    case = make_case(Shape(tokens=4, bag=3, rows=5, columns=3), torch.float64)
    assert torch.autograd.gradcheck(
        lambda t, w: bag(t, case.indices, w), (case.table, case.weights)
    )
    assert torch.autograd.gradcheck(lambda t, x: dot(t, case.indices, x), (case.table, case.x))


def test_gradcheck_of_chunks_and_gate():
    case = make_case(Shape(tokens=4, bag=3, rows=5, columns=3), torch.float64)
    chunks = [_leaf(chunk) for chunk in case.table.split(3)]

    def bag(first, last, weights, gate):
        return weighted_bag([first, last], case.indices, weights, gate)

    assert torch.autograd.gradcheck(bag, (*chunks, case.weights, case.gate))
