"""product_key_topk and product_key_scores against all N * N scores, sorted."""

import pytest
import torch

from memory_kernels import product_key_scores, product_key_topk
from memory_kernels.product_key.reference import (
    product_key_scores_reference,
    product_key_topk_reference,
)

# T tokens, H heads, N half-keys, Dk, K slots
SHAPES = [
    (1, 1, 1, 2, 1),
    (3, 2, 5, 6, 1),
    (3, 2, 5, 6, 5),
    (9, 4, 16, 100, 3),
    (4, 3, 33, 18, 32),
    (2, 1, 257, 6, 64),
    (0, 2, 5, 6, 3),
]


def make_inputs(tokens, heads, half_keys, key_dim, *, dtype=torch.float64, integers=False):
    """Query [T, H, Dk] and keys [H, 2, N, Dk / 2]; small whole numbers make every score exact."""
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (values.round() if integers else values).to(dtype).requires_grad_()

    return draw(tokens, heads, key_dim), draw(heads, 2, half_keys, key_dim // 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_equals_definition(shape):
    *sizes, k = shape
    query, keys = make_inputs(*sizes)
    indices, scores = product_key_topk(query, keys, k, normalize=False)
    wanted_indices, wanted_scores = product_key_topk_reference(query, keys, k)
    assert indices.dtype == torch.int32
    assert indices.is_contiguous()
    assert torch.equal(indices.long(), wanted_indices)
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-12, atol=1e-12)
    same_indices, weights = product_key_topk(query, keys, k)
    assert torch.equal(same_indices, indices)
    torch.testing.assert_close(weights, wanted_scores.softmax(dim=-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_fall_to_the_lower_index_in_every_dtype(shape, dtype):
    """Scores are whole numbers, so nothing rounds and most of them are equal to others."""
    *sizes, k = shape
    query, keys = make_inputs(*sizes, dtype=dtype, integers=True)
    indices, scores = product_key_topk(query, keys, k, normalize=False)
    wanted_indices, wanted_scores = product_key_topk_reference(query.double(), keys.double(), k)
    assert scores.dtype == torch.float32
    assert torch.equal(scores.double(), wanted_scores)
    assert torch.equal(indices.long(), wanted_indices)


def test_all_scores_equal():
    indices, weights = product_key_topk(torch.zeros(2, 2, 4), torch.ones(2, 2, 9, 2), 7)
    assert torch.equal(indices, torch.arange(7, dtype=torch.int32).expand(2, 2, 7))
    torch.testing.assert_close(weights, torch.full((2, 2, 7), 1 / 7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_definition(shape):
    *sizes, k = shape
    query, keys = make_inputs(*sizes)
    ours = product_key_topk(query, keys, k)[1]
    wanted = product_key_topk_reference(query, keys, k)[1].softmax(dim=-1)
    upstream = torch.cos(torch.arange(ours.numel(), dtype=torch.float64)).view(ours.shape)
    for gradient, exact in zip(
        torch.autograd.grad(ours, (query, keys), upstream),
        torch.autograd.grad(wanted, (query, keys), upstream),
        strict=True,
    ):
        torch.testing.assert_close(gradient, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck_of_topk(normalize: bool):
    query, keys = make_inputs(3, 2, 7, 6)
    function = lambda query, keys: product_key_topk(query, keys, 4, normalize=normalize)[1]  # noqa: E731
    assert torch.autograd.gradcheck(function, (query, keys))


def test_gradcheck_of_scores():
    query, keys = make_inputs(3, 2, 7, 6)
    slots = torch.tensor([[0, 48, 48], [7, 6, 13]]).expand(3, 2, 3)
    function = lambda query, keys: product_key_scores(query, keys, slots)  # noqa: E731
    assert torch.autograd.gradcheck(function, (query, keys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_scored_in_fp32(dtype):
    query, keys = make_inputs(5, 2, 9, 64, dtype=dtype)
    _, scores = product_key_topk(query, keys, 4, normalize=False)
    _, exact = product_key_topk_reference(query.double(), keys.double(), 4)
    # 64 products, each exact in fp32; scores in bf16 itself would be off by some 1e-2.
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    scores.sum().backward()
    assert (query.grad.dtype, keys.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_of_given_slots(shape, index_dtype):
    *sizes, k = shape
    query, keys = make_inputs(*sizes, dtype=torch.float32)
    everything = product_key_scores_reference(query, keys)
    generator = torch.Generator().manual_seed(2)
    slots = torch.randint(everything.shape[-1], (*everything.shape[:2], k), generator=generator)
    ours = product_key_scores(query, keys, slots.to(index_dtype))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, everything.gather(-1, slots), rtol=1e-5, atol=1e-5)


def test_topk_and_scores_agree_to_the_bit():
    query, keys = make_inputs(9, 4, 16, 100, dtype=torch.float32)
    indices, scores = product_key_topk(query, keys, 8, normalize=False)
    assert torch.equal(product_key_scores(query, keys, indices), scores)


def test_half_keys_that_are_not_chosen_get_no_gradient():
    query, keys = make_inputs(1, 1, 12, 4)
    indices, weights = product_key_topk(query, keys, 3)
    weights[..., 0].sum().backward()
    chosen = torch.zeros(2, 12, dtype=torch.bool)
    chosen[0, indices.flatten() // 12] = True
    chosen[1, indices.flatten() % 12] = True
    assert torch.equal(keys.grad[0].any(dim=-1), chosen)


@pytest.mark.parametrize("half_keys, index_dtype", [(46340, torch.int32), (46341, torch.int64)])
def test_slots_beyond_31_bits(half_keys: int, index_dtype):
    """The last slot is the best one; its number does not fit int32 above 46340 half-keys."""
    keys = torch.arange(half_keys, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 2, -1, 1)
    indices, scores = product_key_topk(torch.ones(1, 1, 2), keys, 2, normalize=False)
    assert indices.dtype == index_dtype
    # The second and third best tie: (N - 2, N - 1) has the lower number.
    assert indices.tolist() == [[[half_keys**2 - 1, (half_keys - 1) * half_keys - 1]]]
    assert torch.equal(product_key_scores(torch.ones(1, 1, 2), keys, indices), scores)


def test_inference_before_training():
    """What is kept between calls was made under inference mode first."""
    with torch.inference_mode():
        product_key_topk(torch.randn(2, 1, 6), torch.randn(1, 2, 29, 3), 27)
    query, keys = make_inputs(2, 1, 29, 6)
    product_key_topk(query, keys, 27)[1].square().sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize(
    ("query", "keys", "k", "message"),
    [
        ((3, 12), (2, 2, 5, 3), 2, r"^query: \[T, H, Dk\] wanted, got \[3, 12\]"),
        ((3, 2, 6), (2, 5, 3), 2, r"^keys: .* = \[2, 2, N, 3\] wanted, got \[2, 5, 3\]"),
        ((3, 2, 6), (3, 2, 5, 3), 2, "^keys: "),
        ((3, 2, 6), (2, 1, 5, 3), 2, "^keys: "),
        ((3, 2, 6), (2, 2, 5, 4), 2, "^keys: "),
        ((3, 2, 7), (2, 2, 5, 3), 2, r"^keys: .*\[2, 2, N, 3.5\]"),
        ((3, 2, 6), (2, 2, 5, 3), 0, "^k: 1 to the 5 half-keys wanted, got 0"),
        ((3, 2, 6), (2, 2, 5, 3), 6, "^k: 1 to the 5 half-keys wanted, got 6"),
    ],
)
def test_topk_names_the_wrong_argument(query, keys, k: int, message: str):
    with pytest.raises(ValueError, match=message):
        product_key_topk(torch.randn(query), torch.randn(keys), k)


@pytest.mark.parametrize(
    "indices",
    [
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(2, 2, 4, dtype=torch.int64),
        torch.zeros(3, 1, 4, dtype=torch.int64),
        torch.zeros(3, 2, 4),
    ],
    ids=["dimensions", "tokens", "heads", "dtype"],
)
def test_scores_name_the_wrong_argument(indices: torch.Tensor):
    query, keys = make_inputs(3, 2, 5, 6)
    with pytest.raises(ValueError, match=r"^indices: \[3, 2, K\] int32 or int64 wanted, got \["):
        product_key_scores(query, keys, indices)
    with pytest.raises(ValueError, match="^keys: "):
        product_key_scores(query, keys[:1], torch.zeros(3, 2, 4, dtype=torch.int64))
