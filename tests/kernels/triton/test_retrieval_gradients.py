"""Gradients of the retrieval on Triton, by both routes, against autograd over the definition."""

import pytest
import torch

from memory_kernels import product_key_scores, product_key_topk
from memory_kernels.product_key import triton_gradient
from memory_kernels.product_key.reference import (
    product_key_scores_reference,
    product_key_topk_reference,
)
from tests.devices import TEST_DEVICE

# Sums of some ten terms of order one, in fp32; in bf16 the terms are rounded too, or cut in the
# interpreter, and so is the result.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make_inputs(tokens, heads, half_keys, key_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(TEST_DEVICE, dtype).requires_grad_()

    return draw(tokens, heads, key_dim), draw(heads, 2, half_keys, key_dim // 2)


def assert_close(ours, exact, dtype) -> None:
    for gradient, wanted in zip(ours, exact, strict=True):
        assert gradient.dtype == dtype
        error = (gradient.double() - wanted).abs().max()
        assert error <= TOLERANCES[dtype] * wanted.abs().max(), f"off by {error:.2e}"


@pytest.mark.parametrize("normalize", [True, False], ids=["weights", "scores"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_gradients_equal_definition(dtype, normalize):
    query, keys = make_inputs(4, 2, 18, 12, dtype)
    indices, ours = product_key_topk(query, keys, 5, normalize=normalize)
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, keys)]
    wanted_indices, wanted = product_key_topk_reference(*exact, 5)
    wanted = wanted.softmax(dim=-1) if normalize else wanted
    assert torch.equal(indices.long(), wanted_indices)
    upstream = torch.cos(torch.arange(ours.numel(), device=TEST_DEVICE).double()).view(ours.shape)
    assert_close(
        torch.autograd.grad(ours, (query, keys), upstream.float()),
        torch.autograd.grad(wanted, exact, upstream),
        dtype,
    )


@pytest.mark.parametrize("route", ["products", "bags"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_repeated_slots(route: str, dtype, monkeypatch):
    """The same slot, and slots of a common half-key, in one list; several chunks of tokens."""
    monkeypatch.setattr(triton_gradient, "MATRIX_BYTES", 2 * 4 * 18 * dtype.itemsize)
    query, keys = make_inputs(5, 2, 18, 6, dtype)
    slots = torch.tensor([[0, 323, 0, 18, 1], [20, 20, 20, 38, 323]], device=TEST_DEVICE)
    slots = slots.int().expand(5, 2, 5).contiguous()
    grad = torch.randn(5, 2, 5, generator=torch.Generator().manual_seed(1)).to(TEST_DEVICE)
    gradients = getattr(triton_gradient, f"gradients_by_{route}")
    with torch.no_grad():
        ours = [gradients(query, keys, slots, grad) for _ in range(2)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (query, keys)]
    scores = product_key_scores_reference(*exact).gather(-1, slots.long())
    assert_close(ours[0], torch.autograd.grad(scores, exact, grad.double()), dtype)
    for first, second in zip(*ours, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    "dtype, half_keys, num_slots, route",
    [
        (torch.bfloat16, 18, 2, "products"),
        (torch.bfloat16, 19, 2, "bags"),
        (torch.bfloat16, 18, 128, "products"),
        (torch.bfloat16, 18, 129, "bags"),
        (torch.float32, 18, 2, "bags"),
    ],
    ids=str,
)
def test_route(dtype, half_keys: int, num_slots: int, route: str, monkeypatch):
    monkeypatch.setattr(triton_gradient, "MOST_HALF_KEYS_OF_PRODUCTS", 18)
    taken = []
    for name in ("products", "bags"):
        function = getattr(triton_gradient, f"gradients_by_{name}")

        def note(*operands, name=name, function=function):
            taken.append(name)
            return function(*operands)

        monkeypatch.setattr(triton_gradient, f"gradients_by_{name}", note)
    query, keys = make_inputs(2, 1, half_keys, 4, dtype)
    slots = torch.tensor([[[3, 60]], [[60, 60]]], device=TEST_DEVICE).repeat(1, 1, 65)
    slots = slots[..., :num_slots]
    product_key_scores(query, keys, slots).sum().backward()
    assert taken == [route]


def test_no_tokens():
    for dtype in TOLERANCES:
        query, keys = make_inputs(0, 2, 18, 4, dtype)
        product_key_topk(query, keys, 3)[1].sum().backward()
        assert query.grad.shape == query.shape
        assert torch.equal(keys.grad, torch.zeros_like(keys))
