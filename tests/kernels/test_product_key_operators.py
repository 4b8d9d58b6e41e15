"""The retrieval's operators as torch sees them: opcheck, torch.compile, order of sums."""

import pytest
import torch

from memory_kernels import product_key_scores, product_key_topk
from memory_kernels.product_key.torch_ops import sum_by_index, sum_by_index_without_atomics
from memory_kernels.product_key.triton_pairs import pair_table
from tests.kernels.test_product_key import make_inputs

OPERATORS = torch.ops.memory_kernels
SLOTS = torch.tensor([[0, 48, 48], [7, 6, 13]]).expand(3, 2, 3).contiguous()


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


@pytest.mark.parametrize("normalize", [True, False], ids=["weights", "scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_topk(dtype, normalize: bool):
    query, keys = make_inputs(3, 2, 7, 6, dtype=dtype)
    torch.library.opcheck(OPERATORS.product_key_topk, (query, keys, 4, normalize))


def test_opcheck_of_scores_and_backward():
    query, keys = make_inputs(3, 2, 7, 6)
    torch.library.opcheck(OPERATORS.product_key_scores, (query, keys, SLOTS))
    operands = query.detach(), keys.detach(), SLOTS, torch.ones(3, 2, 3, dtype=torch.float64)
    torch.library.opcheck(OPERATORS.product_key_backward, operands)


def _random_slots_too(query, keys):
    indices, weights = product_key_topk(query, keys, 4)
    return indices, weights.sum(-1) * product_key_scores(query, keys, SLOTS).square().sum(-1)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_whole(dynamic: bool):
    compiled = torch.compile(
        _random_slots_too, backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    results = []
    for function in (_random_slots_too, compiled):
        query, keys = make_inputs(3, 2, 7, 6)
        indices, y = function(query, keys)
        y.sum().backward()
        results.append((indices, y.detach(), query.grad, keys.grad))
    for ours, wanted in zip(*results, strict=True):
        assert torch.equal(ours, wanted)


def test_gradient_of_one_operand():
    query, keys = make_inputs(3, 2, 7, 6)
    product_key_topk(query, keys.detach(), 4)[1].square().sum().backward()
    alone = query.grad.clone()
    query.grad = None
    product_key_topk(query, keys, 4)[1].square().sum().backward()
    assert torch.equal(query.grad, alone)


@pytest.mark.parametrize("size", [1, 3, 50])
def test_sums_by_index_need_no_atomics(size: int):
    """Whole numbers: both ways must give the same sums to the bit, also where all are one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-9, 10, (2, 4, 5, 8), generator=generator).double()
    index = torch.randint(size, (2, 4, 5, 8), generator=generator)
    ours = sum_by_index_without_atomics(values, index, size)
    assert torch.equal(ours, sum_by_index(values, index, size))
    assert torch.equal(ours, torch.zeros(2, 4, 5, size).double().scatter_add_(-1, index, values))


@pytest.mark.parametrize("k, num_pairs", [(1, 1), (3, 5), (32, 119), (64, 280)])
def test_pairs_that_can_win(k: int, num_pairs: int):
    first, second = pair_table(k, torch.device("cpu")).tolist()
    assert len(set(zip(first, second, strict=True))) == len(first) == num_pairs
    assert all((i + 1) * (j + 1) <= k for i, j in zip(first, second, strict=True))
