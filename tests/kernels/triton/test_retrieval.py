"""product_key_topk on Triton against the definition: indices, scores, ties, edges.

Inputs are small whole numbers wherever results must be equal to the bit: no score is rounded, in
any dtype, and most of them are equal to others. Triton's interpreter multiplies bf16 wrongly, so
there the kernel widens it to fp32 before the product; the product itself runs on a GPU only.
"""

import pytest
import torch

from memory_kernels import choice, product_key_scores, product_key_topk
from memory_kernels.product_key import triton_candidates, triton_ops
from memory_kernels.product_key.reference import product_key_topk_reference
from tests.devices import TEST_DEVICE

INFINITY = float("inf")

# T tokens, H heads, N half-keys, Dk, K slots
SHAPES = [
    (1, 1, 16, 2, 1),
    (3, 2, 16, 100, 5),
    (2, 1, 100, 12, 20),
    (17, 1, 100, 130, 3),
    (1, 1, 1024, 34, 32),
    (1, 1, 300, 16, 64),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of half-keys, several rounds of narrowing, several chunks of tokens."""
    monkeypatch.setattr(triton_candidates, "BLOCK_KEYS", 32)
    monkeypatch.setattr(triton_candidates, "BLOCK_KEYS_FP32", 32)
    monkeypatch.setattr(triton_candidates, "NARROW_ENTRIES", 64)
    monkeypatch.setattr(triton_ops, "CANDIDATE_BYTES", 2**11)


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """torch.empty holds what must never be read: NaN, or the largest number."""
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *size, **options):
        new = empty(tensor, *size, **options)
        return new.fill_(torch.nan if new.is_floating_point() else torch.iinfo(new.dtype).max)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def make_inputs(tokens, heads, half_keys, key_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=generator).to(TEST_DEVICE, dtype)

    return draw(tokens, heads, key_dim), draw(heads, 2, half_keys, key_dim // 2)


def assert_equals_definition(query, keys, k: int) -> None:
    indices, scores = product_key_topk(query, keys, k, normalize=False)
    wanted_indices, wanted_scores = product_key_topk_reference(query.double(), keys.double(), k)
    assert (indices.dtype, scores.dtype) == (torch.int32, torch.float32)
    assert torch.equal(scores.double(), wanted_scores)
    assert torch.equal(indices.long(), wanted_indices)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_definition(shape, poisoned_buffers):
    *sizes, k = shape
    assert_equals_definition(*make_inputs(*sizes), k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    assert_equals_definition(*make_inputs(3, 1, 100, 130, dtype=dtype), 4)


@pytest.mark.parametrize("shape", [(3, 1, 100, 6, 5), (1, 1, 300, 6, 9)], ids=str)
def test_many_blocks(shape, small_blocks, poisoned_buffers):
    *sizes, k = shape
    assert_equals_definition(*make_inputs(*sizes), k)


@pytest.mark.parametrize("k", [1, 7])
def test_all_scores_equal(k: int, small_blocks):
    query, keys = torch.zeros(2, 1, 4), torch.ones(1, 2, 70, 2)
    indices, weights = product_key_topk(query.to(TEST_DEVICE), keys.to(TEST_DEVICE), k)
    assert torch.equal(indices.cpu(), torch.arange(k, dtype=torch.int32).expand(2, 1, k))
    torch.testing.assert_close(weights.cpu(), torch.full((2, 1, k), 1 / k))


def _keys_with_scores(first: torch.Tensor, second: torch.Tensor):
    """Query and keys whose half scores are `first` and `second` [N]: halves of one column."""
    keys = torch.stack((first, second)).view(1, 2, -1, 1)
    return torch.ones(1, 1, 2, device=TEST_DEVICE), keys.to(TEST_DEVICE)


def _topk(scores, k: int) -> tuple[list[int], torch.Tensor]:
    indices, sums = product_key_topk(*_keys_with_scores(*scores), k, normalize=False)
    return indices.flatten().tolist(), sums.flatten().cpu()


def _on_torch(scores, k: int) -> tuple[list[int], torch.Tensor]:
    choice.use_kernels("torch")
    result = _topk(scores, k)
    choice.use_kernels("triton")
    return result


def test_negative_zero_equals_zero():
    zeros = torch.zeros(40)
    zeros[::2] = -0.0
    # -0.0 + -0.0 and -0.0 + 0.0 are different zeros too.
    assert _topk((zeros, zeros), 7)[0] == list(range(7))


@pytest.mark.parametrize("k", [1, 6])
def test_scores_of_every_size(k: int):
    """Scores from 1e-36 to 1e36, infinities among them, equal ones on the border, both signs."""
    generator = torch.Generator().manual_seed(k)
    powers = torch.randint(-9, 10, (2, 150), generator=generator)
    halves = torch.randn(2, 150, generator=generator).sign() * 10.0 ** (4 * powers)
    halves[0, 50:60] = -INFINITY
    halves[1, :140] = halves[1, :140].abs().neg()
    for scores in (halves, -halves.abs()):
        ours, wanted = _topk(scores, k), _on_torch(scores, k)
        assert ours[0] == wanted[0]
        assert torch.equal(ours[1], wanted[1])


@pytest.mark.parametrize("k", [1, 3, 4])
def test_minus_infinity_comes_last(k: int):
    scores = (torch.tensor([1.0, -INFINITY, 3.0, -INFINITY]), torch.tensor([2.0, 2.0, -5.0, 0.0]))
    ours, wanted = _topk(scores, k), _on_torch(scores, k)
    assert ours[0] == wanted[0]
    assert torch.equal(ours[1], wanted[1])


def test_sums_that_rounding_makes_equal():
    """The halves decide first, as on torch: see test_selection.py."""
    scores = (torch.arange(8.0), 1e9 - 1e8 * torch.arange(8.0))
    assert _topk(scores, 3)[0] == [40, 48, 56]


@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("num_nan", [1, 39, 97], ids=str)
def test_nan_scores_still_give_slots_in_range(num_nan: int):
    """NaN counts as the best score: a diverging run ends by its loss, not by a wild read."""
    scores = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    scores[0, 3 : 3 + num_nan] = torch.nan
    indices, sums = _topk(scores, 7)
    assert min(indices) >= 0
    assert max(indices) < 100 * 100
    assert len(set(indices)) == 7
    assert sums[0].isnan()


def test_equals_torch_path_on_random_numbers(small_blocks):
    """Different sums of products are rounded differently, so scores are close and not equal."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 2, 64, generator=generator).to(TEST_DEVICE)
    keys = torch.randn(2, 2, 50, 32, generator=generator).to(TEST_DEVICE)
    indices, weights = product_key_topk(query, keys, 7)
    choice.use_kernels("torch")
    wanted_indices, wanted_weights = product_key_topk(query, keys, 7)
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)


def test_operands_of_different_dtypes_and_strides():
    query, keys = make_inputs(4, 2, 20, 6)
    wanted = product_key_topk(query, keys, 5)
    strided = keys.to(torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    ours = product_key_topk(query, strided, 5)
    assert torch.equal(ours[0], wanted[0])
    assert torch.equal(ours[1], wanted[1])


def test_no_tokens():
    query, keys = make_inputs(0, 2, 20, 6)
    indices, weights = product_key_topk(query, keys, 5)
    assert indices.shape == weights.shape == (0, 2, 5)


def test_same_bits_twice():
    query, keys = torch.randn(3, 1, 40), torch.randn(1, 2, 60, 20)
    query, keys = query.to(TEST_DEVICE), keys.to(TEST_DEVICE)
    first, second = (product_key_topk(query, keys, 7) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_scores_of_given_slots(index_dtype):
    query, keys = make_inputs(3, 2, 16, 20)
    slots = torch.randint(256, (3, 2, 4), generator=torch.Generator().manual_seed(2))
    slots[0, 0] = torch.tensor([255, 0, 255, 17])
    slots = slots.to(TEST_DEVICE, index_dtype)
    indices, scores = product_key_topk_reference(query.double(), keys.double(), 256)
    wanted = scores.gather(-1, indices.argsort(-1).gather(-1, slots.long()))
    assert torch.equal(product_key_scores(query, keys, slots).double(), wanted)


@pytest.mark.parametrize("half_keys, k", [(2**16 + 1, 2), (100, 65)], ids=str)
def test_more_than_the_kernels_take(half_keys: int, k: int):
    keys = torch.zeros(1, 2, half_keys, 1, device=TEST_DEVICE)
    with pytest.raises(ValueError, match="at most 65536 half-keys and k = 64"):
        product_key_topk(torch.zeros(1, 1, 2, device=TEST_DEVICE), keys, k)


def test_slots_beyond_31_bits(monkeypatch):
    """The last slot is the best one; its number does not fit int32 above 46340 half-keys."""
    if TEST_DEVICE == "cpu":  # hundreds of blocks would take the interpreter a minute
        monkeypatch.setattr(triton_candidates, "BLOCK_KEYS_FP32", 2**16)
    keys = torch.arange(46341, dtype=torch.float32, device=TEST_DEVICE).view(1, 1, -1, 1)
    query = torch.ones(1, 1, 2, device=TEST_DEVICE)
    indices, _ = product_key_topk(query, keys.expand(1, 2, -1, 1), 2, normalize=False)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [[[46341**2 - 1, 46340 * 46341 - 1]]]
