"""The total order of slots: ties, signed zeros, infinities, sums that only rounding makes equal."""

import pytest
import torch

from memory_kernels.product_key.torch_ops import best_slots, topk_lower_index_first

INFINITY = float("inf")


def _brute_force(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and sums of [2, H, T, N] half scores from all pairs, the lower index first in a tie."""
    sums = (scores[0][..., :, None] + scores[1][..., None, :]).flatten(-2)
    sums, slots = sums.sort(dim=-1, descending=True, stable=True)
    return slots[..., :k], sums[..., :k]


@pytest.mark.parametrize("num_values", [1, 2, 5, 1000])
@pytest.mark.parametrize("k", [1, 2, 7, 16])
def test_few_distinct_scores(num_values: int, k: int):
    """The fewer values, the more ties, within a half and between sums of different halves."""
    generator = torch.Generator().manual_seed(num_values)
    scores = torch.randint(num_values, (2, 3, 50, 16), generator=generator).double()
    slots, sums = best_slots(scores, k)
    wanted_slots, wanted_sums = _brute_force(scores, k)
    assert torch.equal(sums, wanted_sums)
    assert torch.equal(slots, wanted_slots)


def test_negative_zero_equals_zero():
    scores = torch.tensor([0.0, -0.0, -1.0, -0.0, 0.0]).view(1, 1, 1, 5).expand(2, 1, 1, 5)
    slots, _ = best_slots(scores, 5)
    assert slots.tolist() == [[[0, 1, 3, 4, 5]]]
    position = topk_lower_index_first(torch.tensor([[-0.0, 0.0]]), torch.arange(2), 1)
    assert position.tolist() == [[0]]


def _with_infinities(sign: int) -> torch.Tensor:
    first = torch.tensor([1.0, sign * INFINITY, 3.0, sign * INFINITY])
    return torch.stack((first, torch.tensor([2.0, 2.0, -5.0, 0.0])))[:, None, None]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_minus_infinity_comes_last(k: int):
    slots, sums = best_slots(_with_infinities(-1), k)
    wanted_slots, wanted_sums = _brute_force(_with_infinities(-1), k)
    assert torch.equal(slots, wanted_slots)
    assert torch.equal(sums, wanted_sums)


@pytest.mark.parametrize("k, wanted", [(1, [4]), (2, [4, 5]), (3, [4, 5, 7]), (4, [4, 5, 6, 7])])
def test_infinity_comes_first(k: int, wanted: list[int]):
    """All sums with infinity are equal: among the half-keys kept, the lower index wins."""
    slots, sums = best_slots(_with_infinities(1), k)
    assert sums.eq(INFINITY).all()
    assert slots.flatten().tolist() == wanted


def test_overflowing_sums_tie_at_infinity():
    """Finite halves whose sums exceed fp32: the ties that overflow makes fall by the pairs kept."""
    largest = torch.finfo(torch.float32).max
    scores = torch.tensor([largest, largest, 0.0]).view(1, 1, 1, 3).expand(2, 1, 1, 3)
    slots, sums = best_slots(scores, 3)
    assert sums.eq(INFINITY).all()
    assert slots.tolist() == [[[0, 1, 3]]]


def test_nan_scores_still_give_slots_in_range():
    """A diverging run must end by its loss, not by a wild read."""
    scores = torch.full((2, 1, 3, 8), float("nan"))
    scores[:, :, 1:] = torch.randn(2, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    scores[0, :, 1, 3] = float("nan")
    slots, _ = best_slots(scores, 4)
    assert slots.min() >= 0
    assert slots.max() < 64
    assert torch.equal(slots[:, 2], _brute_force(scores, 4)[0][:, 2])


def test_sums_that_rounding_makes_equal():
    """The halves decide first: a better half-key wins even where the rounded sums are equal.

    The scores are those of the definition in any case; only which of several equal ones are taken
    may differ from sorting all sums.
    """
    scores = torch.stack((torch.arange(8.0), 1e9 - 1e8 * torch.arange(8.0)))[:, None, None]
    slots, sums = best_slots(scores, 3)
    wanted_slots, wanted_sums = _brute_force(scores, 3)
    assert torch.equal(sums, wanted_sums)
    assert wanted_slots.tolist() == [[[0, 8, 16]]]
    assert slots.tolist() == [[[40, 48, 56]]]


@pytest.mark.parametrize("k", [1, 3, 6, 7])
def test_ties_are_decided_by_the_given_index(k: int):
    scores = torch.tensor([[5.0, 1, 5, 5, 0, 5, 1], [1, 2, 3, 4, 5, 6, 7], [2, 2, 2, 2, 2, 2, 2]])
    index = torch.tensor([[9, 8, 7, 6, 5, 4, 3], [0, 1, 2, 3, 4, 5, 6], [3, 1, 4, 0, 5, 9, 2]])
    wanted = [[5, 3, 2, 0, 6, 1, 4], [6, 5, 4, 3, 2, 1, 0], [3, 1, 6, 0, 2, 4, 5]]
    assert topk_lower_index_first(scores, index, k).tolist() == [row[:k] for row in wanted]
