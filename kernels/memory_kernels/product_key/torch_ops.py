"""Product-key retrieval on torch operators.

Axes: T tokens, H heads, N half-keys, K slots chosen a head.

Every order here is total, so that ranks, runs and devices agree: equal scores fall to the lower
index.
"""

import functools

import torch
from torch import Tensor

from memory_kernels.checks import check_in_table


def slot_dtype(num_half_keys: int) -> torch.dtype:
    """int32 where N * N slots fit it, else int64."""
    return torch.int32 if num_half_keys**2 < 2**31 else torch.int64


def half_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Scores of both halves, [2, H, T, N] in fp32 (fp64 for fp64); query and keys as the public
    call."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    halves = query.to(dtype).unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    return halves @ keys.to(dtype).permute(1, 0, 3, 2)


def topk(query: Tensor, keys: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """weights and indices; see the operator product_key_topk in operators.py."""
    slots, scores = best_slots(half_scores(query, keys), k)
    indices = slots.to(slot_dtype(keys.shape[2])).transpose(0, 1).contiguous()
    chosen = scores.transpose(0, 1).contiguous()
    return chosen.softmax(dim=-1) if normalize else chosen, indices


def scores(query: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    """Scores of given slots; see the operator product_key_scores in operators.py.

    From the same products as those of `topk`, so that a slot has one score to the bit.
    """
    check_in_table("indices", indices, keys.shape[2] ** 2)
    i, j = _half_indices(indices, keys.shape[2])
    first, second = half_scores(query, keys)
    return (first.gather(-1, i) + second.gather(-1, j)).transpose(0, 1).contiguous()


def gradients(
    query: Tensor, keys: Tensor, indices: Tensor, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys; see the operator product_key_backward in operators.py."""
    dtype = grad_scores.dtype
    grad = grad_scores.transpose(0, 1)
    half_indices = torch.stack(_half_indices(indices, keys.shape[2]))
    grad_halves = sum_by_index(grad.expand(2, *grad.shape), half_indices, keys.shape[2])
    halves = query.to(dtype).unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    grad_query = grad_halves @ keys.to(dtype).transpose(0, 1)
    grad_keys = grad_halves.mT @ halves
    return (
        grad_query.permute(2, 1, 0, 3).flatten(-2).to(query.dtype).contiguous(),
        grad_keys.transpose(0, 1).to(keys.dtype).contiguous(),
    )


def _half_indices(indices: Tensor, num_half_keys: int) -> tuple[Tensor, Tensor]:
    """Both half-keys of slots [T, H, K], int64 [H, T, K] each."""
    slots = indices.long().transpose(0, 1)
    return slots // num_half_keys, slots % num_half_keys


def sum_by_index(values: Tensor, index: Tensor, size: int) -> Tensor:
    """[..., size]: the sum of those of values [..., K] that have an index [..., K], in fixed order.

    On a GPU scatter_add_ itself sums repeated entries by atomics, in any order.
    """
    if values.is_cuda:
        return sum_by_index_without_atomics(values, index, size)
    return values.new_zeros(*values.shape[:-1], size).scatter_add_(-1, index, values)


def sum_by_index_without_atomics(values: Tensor, index: Tensor, size: int) -> Tensor:
    """`sum_by_index` on any device; needs memory for [..., K, K]."""
    same = index[..., :, None] == index[..., None, :]
    totals = (same * values[..., None, :]).sum(dim=-1)
    # The first of equal entries writes their sum; the others write zeros to a column of no one.
    repeats = same.tril(-1).any(dim=-1)
    sums = values.new_zeros(*values.shape[:-1], size + 1)
    sums.scatter_(-1, index.where(~repeats, size), totals.where(~repeats, 0.0))
    return sums[..., :size]


def best_slots(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best slots of each head, best first, and their scores.

    Args:
        scores: [2, H, T, N].

    Returns:
        slots i * N + j, int64, and scores, [H, T, K] each.
    """
    candidates, ranks = _select(scores, k)
    i, j = candidates.gather(-1, ranks)
    first, second = scores.gather(-1, torch.stack((i, j)))
    return i * scores.shape[-1] + j, first + second


def _select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best half-keys of each set [2, H, T, K], and the winning pairs' ranks in them."""
    num_half_keys = scores.shape[-1]
    half_keys = torch.arange(num_half_keys, device=scores.device)
    candidates = topk_lower_index_first(scores, half_keys, k)
    best = scores.gather(-1, candidates)
    first, second = pairs_that_can_win(k, scores.device)
    slots = candidates[0][..., first] * num_half_keys + candidates[1][..., second]
    sums = best[0][..., first] + best[1][..., second]
    winners = topk_lower_index_first(sums, slots, k)
    return candidates, torch.stack((first[winners], second[winners]))


@functools.lru_cache(maxsize=64)
def pairs_that_can_win(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (i, j) with (i + 1)(j + 1) <= k: any other pair is below k pairs that are no worse."""
    ranks = torch.arange(1, k + 1, device=device)
    first, second = torch.nonzero(ranks[:, None] * ranks[None, :] <= k, as_tuple=True)
    return first, second


def topk_lower_index_first(scores: Tensor, index: Tensor, k: int) -> Tensor:
    """Positions of the k highest scores in the last dimension, of equal ones the lower index first.

    torch.topk leaves the order of equal scores open, so the few rows that have any are sorted
    again.

    Args:
        scores: [..., N].
        index: [N] or [..., N], what a tie is decided by; without repeats in a row.

    Returns:
        [..., K], int64.
    """
    num_scores = scores.shape[-1]
    # One more than wanted shows a tie across the border.
    best = scores.topk(min(k + 1, num_scores), dim=-1)
    positions = best.indices[..., :k].contiguous()
    tied = (best.values[..., 1:] == best.values[..., :-1]).any(dim=-1)
    if tied.any():
        by_index = index.expand_as(scores)[tied].argsort(dim=-1)
        by_score = scores[tied].gather(-1, by_index).sort(dim=-1, descending=True, stable=True)
        positions[tied] = by_index.gather(-1, by_score.indices[..., :k])
    return positions
