"""Product-key retrieval on torch operators.

Axes: T tokens, H heads, N half-keys, K slots chosen a head.

Every order here is total, so that ranks, runs and devices agree: equal scores fall to the lower
index.
"""

import functools

import torch
from torch import Tensor


def half_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Scores of both halves, [2, H, T, N] in fp32 (fp64 for fp64); query and keys as the public
    call."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    halves = query.to(dtype).unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
    return halves @ keys.to(dtype).permute(1, 0, 3, 2)


@torch.no_grad()
def select_slots(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The half-keys (i, j) of the k best slots of each head, best first.

    Args:
        scores: [2, H, T, N].

    Returns:
        i and j, [H, T, K] each, int64.
    """
    num_half_keys = scores.shape[-1]
    half_keys = torch.arange(num_half_keys, device=scores.device)
    candidates = topk_lower_index_first(scores, half_keys, k)
    best = scores.gather(-1, candidates)
    first, second = _pairs_that_can_win(k, scores.device)
    i, j = candidates[0][..., first], candidates[1][..., second]
    sums = best[0][..., first] + best[1][..., second]
    winners = topk_lower_index_first(sums, i * num_half_keys + j, k)
    return i.gather(-1, winners), j.gather(-1, winners)


@functools.lru_cache(maxsize=64)
def _pairs_that_can_win(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
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
