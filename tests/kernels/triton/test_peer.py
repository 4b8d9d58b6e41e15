"""peer_experts on Triton against the definition in fp64, outputs and all gradients."""

import pytest
import torch

from memory_kernels import Fp8Shadow, RowGradients
from memory_kernels.peer import peer_experts
from memory_kernels.peer.reference import peer_experts_reference
from memory_kernels.shadow import dequantize_rows
from tests.devices import TEST_DEVICE
from tests.kernels.peer_cases import OPERANDS, SHAPES, Operands, gradients, make_operands


def _assert_near(ours, exact, tolerance: float) -> None:
    error = (ours.detach().double() - exact.detach()).abs().max()
    assert error <= tolerance * exact.abs().max().clamp(min=1e-3)


# bf16: the output and the gradients of tables and x are rounded to 8 bits, or cut in the
# interpreter; nothing else is.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(shape, dtype, tolerance):
    ours = make_operands(shape, dtype).to(TEST_DEVICE)
    exact = ours.double()
    y, golden = peer_experts(*ours), peer_experts_reference(*exact)
    _assert_near(y, golden, tolerance)
    pairs = zip(gradients(y, ours), gradients(golden, exact), strict=True)
    for mine, theirs in pairs:
        _assert_near(mine, theirs, tolerance)


@pytest.mark.parametrize("form", ["main_grad", "rows"])
def test_other_destinations_have_the_dense_gradient(form: str):
    operands = make_operands(SHAPES[2], torch.float32).to(TEST_DEVICE)
    dense = gradients(peer_experts(*operands), operands)
    u, v = operands.u.detach(), operands.v.detach()
    sinks = {}
    if form == "main_grad":
        sinks["main_grads"] = torch.zeros_like(u), torch.zeros_like(v)
    else:
        reads = operands.indices.numel()
        sinks["row_gradients"] = RowGradients.empty(u, reads), RowGradients.empty(v, reads)
    small = [operands.weights, operands.x]
    y = peer_experts(u, v, operands.indices, *small, **sinks)
    for ours, theirs in zip(gradients(y, operands, small), dense[2:], strict=True):
        assert torch.equal(ours, theirs)
    for sink, theirs in zip(*sinks.values(), dense[:2], strict=True):
        filled = sink if form == "main_grad" else sink.to_sparse(u).to_dense()
        assert torch.equal(filled, theirs)


def test_frozen_tables():
    operands = make_operands(SHAPES[1], torch.float32).to(TEST_DEVICE)
    dense = gradients(peer_experts(*operands), operands)
    u, v = operands.u.detach(), operands.v.detach()
    small = [operands.weights, operands.x]
    y = peer_experts(u, v, operands.indices, *small)
    for ours, theirs in zip(gradients(y, operands, small), dense[2:], strict=True):
        # Another kernel computes the dots where no rows' gradients are made.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_fp8_values_are_read_in_the_tables_place():
    operands = make_operands(SHAPES[2], torch.float32).to(TEST_DEVICE)
    shadows = Fp8Shadow.of(operands.u.detach()), Fp8Shadow.of(operands.v.detach())
    u, v = (dequantize_rows(s.values[0], s.scales).double().requires_grad_() for s in shadows)
    exact = operands.double()._replace(u=u, v=v)
    y, golden = peer_experts(*operands, shadows=shadows), peer_experts_reference(*exact)
    _assert_near(y, golden, 1e-5)
    pairs = zip(gradients(y, operands), gradients(golden, exact), strict=True)
    for name, (mine, theirs) in zip(OPERANDS, pairs, strict=True):
        assert torch.isfinite(mine).all(), name
        _assert_near(mine, theirs, 1e-5)


def test_no_reads():
    table = torch.full((3, 4), torch.nan)
    empty = Operands(table, table, torch.zeros(2, 0).int(), torch.zeros(2, 0), torch.ones(2, 4))
    empty = empty.to(TEST_DEVICE)
    y = peer_experts(*empty)
    assert torch.equal(y, torch.zeros_like(y))
    for name, gradient in zip(OPERANDS, gradients(y, empty), strict=True):
        assert not gradient.any(), name
