"""peer_experts on torch's operators: the definition, its gradients, all destinations of them."""

import pytest
import torch

from memory_kernels import RowGradients
from memory_kernels.peer import peer_experts
from memory_kernels.peer.reference import peer_experts_reference
from tests.kernels.peer_cases import OPERANDS, SHAPES, Operands, gradients, make_operands


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(shape, dtype):
    ours, exact = make_operands(shape, dtype), make_operands(shape, dtype).double()
    y = peer_experts(*ours)
    golden = peer_experts_reference(*exact)
    # bf16: the products and the table's rows are rounded to 8 bits on the way.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    pairs = [(y, golden), *zip(gradients(y, ours), gradients(golden, exact), strict=True)]
    for mine, theirs in pairs:
        error = (mine.double() - theirs).abs().max()
        assert error <= tolerance * theirs.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunks"])
def test_every_destination_has_the_dense_gradient(chunked: bool):
    operands = make_operands(SHAPES[2], torch.float32)
    y = peer_experts(*operands)
    dense = dict(zip(OPERANDS, gradients(y, operands), strict=True))

    cut = (lambda table: list(table.detach().split(4))) if chunked else (lambda t: t.detach())
    u, v = cut(operands.u), cut(operands.v)
    small = [operands.weights, operands.x]
    buffers = [torch.zeros_like(operands.u), torch.zeros_like(operands.v)]
    # Views, so that the chunks' gradients land in the whole.
    views = [list(b.split(4)) if chunked else b for b in buffers]
    same = peer_experts(u, v, operands.indices, *small, main_grads=tuple(views))
    assert torch.equal(same, y)
    for ours, name in zip(gradients(same, operands, small), ("weights", "x"), strict=True):
        assert torch.equal(ours, dense[name])
    assert torch.equal(buffers[0], dense["u"]) and torch.equal(buffers[1], dense["v"])

    rows = tuple(RowGradients.empty(t, operands.indices.numel()) for t in (u, v))
    same = peer_experts(u, v, operands.indices, *small, row_gradients=rows)
    gradients(same, operands, small)
    for gradient, name in zip(rows, ("u", "v"), strict=True):
        assert torch.equal(gradient.to_sparse(operands.u).to_dense(), dense[name])


def test_operator_is_a_good_citizen():
    u, v, indices, weights, x = make_operands(SHAPES[1], torch.float32)
    arguments = ([u], [v], indices, weights, x, [], [], "dense", [], [])
    torch.library.opcheck(torch.ops.memory_kernels.peer_experts.default, arguments)
    buffers = [torch.zeros_like(u)], [torch.zeros_like(v)]
    arguments = ([u.detach()], [v.detach()], indices, weights, x, [], [], "main_grad", *buffers)
    torch.library.opcheck(torch.ops.memory_kernels.peer_experts.default, arguments)


def test_gradcheck():
    operands = make_operands(SHAPES[1], torch.float64)
    leaves = [getattr(operands, name) for name in OPERANDS]
    call = lambda u, v, w, x: peer_experts(u, v, operands.indices, w, x)  # noqa: E731
    torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("form", ["dense", "main_grad"])
def test_compiles(form: str):
    operands = make_operands(SHAPES[2], torch.float32)
    small = [operands.weights, operands.x]

    def loss(u, v, weights, x, buffers):
        y = peer_experts(u, v, operands.indices, weights * 2, x, main_grads=buffers)
        return y.square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        buffers = tuple(torch.zeros_like(operands.u) for _ in "uv")
        tables, leaves = [operands.u, operands.v], small
        if form == "dense":
            leaves = [*tables, *small]
        else:
            tables = [table.detach() for table in tables]
        value = function(*tables, *small, None if form == "dense" else buffers)
        results.append((value.detach(), *torch.autograd.grad(value, leaves), *buffers))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("wrong", ["v", "weights", "x", "indices"])
def test_names_the_wrong_argument(wrong: str):
    operands = make_operands(SHAPES[1], torch.float32)._asdict()
    operands[wrong] = operands[wrong][:-1].detach()
    name = {"indices": "weights"}.get(wrong, wrong)
    with pytest.raises(ValueError, match=rf"^{name}: .* wanted"):
        peer_experts(**operands)


def test_no_reads():
    table = torch.full((3, 4), torch.nan)
    empty = Operands(table, table, torch.zeros(2, 0).int(), torch.zeros(2, 0), torch.ones(2, 4))
    assert torch.equal(peer_experts(*empty), torch.zeros(2, 4))
