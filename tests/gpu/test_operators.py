"""The operators on a GPU against their references in fp64 on the CPU."""

import pytest
import torch

from memory_kernels import product_key_topk, row_dot, weighted_bag
from memory_kernels.bag.reference import row_dot_reference, weighted_bag_reference
from memory_kernels.product_key.reference import product_key_topk_reference
from tests.devices import needs_gpu_run

pytestmark = [pytest.mark.gpu, needs_gpu_run]

# A sum of 64 products of rounded numbers: a few units in the last place of its largest entry.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def _assert_close(ours: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    error = (ours.cpu().double() - reference).abs().max() / reference.abs().max()
    assert error < tolerance


@pytest.mark.parametrize("with_main_grad", [False, True], ids=["dense", "main_grad"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("num_columns", [3, 100, 256])
@pytest.mark.parametrize("operator", ["weighted_bag", "row_dot"])
def test_bag_and_gradients(operator: str, num_columns: int, dtype, with_main_grad: bool):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(500, num_columns, generator=generator).to(dtype)
    indices = torch.randint(500, (33, 64), generator=generator)
    is_bag = operator == "weighted_bag"
    operand = torch.randn(33, 64 if is_bag else num_columns, generator=generator).to(dtype)
    grad_output = torch.randn(33, num_columns if is_bag else 64, generator=generator).to(dtype)

    exact = [t.double().requires_grad_() for t in (table, operand)]
    reference = weighted_bag_reference if is_bag else row_dot_reference
    golden = reference(exact[0], indices, exact[1])
    golden.backward(grad_output.double())

    ours = [t.cuda().requires_grad_() for t in (table, operand)]
    main_grad = torch.zeros(table.shape, device="cuda") if with_main_grad else None
    call = weighted_bag if is_bag else row_dot
    output = call(ours[0], indices.cuda().int(), ours[1], main_grad=main_grad)
    output.backward(grad_output.cuda())
    grad_table = main_grad if with_main_grad else ours[0].grad
    _assert_close(output.detach(), golden.detach(), TOLERANCES[dtype])
    _assert_close(grad_table, exact[0].grad, TOLERANCES[dtype])
    _assert_close(ours[1].grad, exact[1].grad, TOLERANCES[dtype])


@pytest.mark.parametrize("num_half_keys, k", [(16, 1), (128, 32), (1024, 32)])
def test_retrieval_with_ties(num_half_keys: int, k: int):
    """Small integers: scores are exact on any device, and many are equal."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randint(-2, 3, (9, 4, 16), generator=generator).float()
    keys = torch.randint(-2, 3, (4, 2, num_half_keys, 8), generator=generator).float()
    indices, scores = product_key_topk(query.cuda(), keys.cuda(), k, normalize=False)
    golden_indices, golden_scores = product_key_topk_reference(query, keys, k)
    assert torch.equal(indices.cpu().long(), golden_indices)
    assert torch.equal(scores.cpu(), golden_scores)
