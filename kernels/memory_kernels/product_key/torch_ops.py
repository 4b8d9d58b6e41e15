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


class _Choose(torch.autograd.Function):
    """values.gather(-1, ranks), whose ranks repeat; with a gradient summed in a fixed order.

    On a GPU gather's own gradient adds repeated entries by atomics, in any order.
    """

    @staticmethod
    def forward(ctx, values: Tensor, ranks: Tensor) -> Tensor:
        ctx.save_for_backward(ranks)
        ctx.num_values = values.shape[-1]
        return values.gather(-1, ranks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output: Tensor):
        (ranks,) = ctx.saved_tensors
        one_hot = ranks[..., None] == torch.arange(ctx.num_values, device=ranks.device)
        return (grad_output[..., None, :] @ one_hot.to(grad_output.dtype)).squeeze(-2), None


def best_slots(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best slots of each head, best first, and their scores, differentiable in `scores`.

    Args:
        scores: [2, H, T, N].

    Returns:
        slots i * N + j, int64, and scores, [H, T, K] each.
    """
    candidates, ranks = _select(scores.detach(), k)
    # A head's candidates are different half-keys, so that this gather's gradient has no repeats.
    best = scores.gather(-1, candidates)
    chosen = _Choose.apply(best, ranks)
    i, j = candidates.gather(-1, ranks)
    return i * scores.shape[-1] + j, chosen[0] + chosen[1]


@torch.no_grad()
def _select(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best half-keys of each set [2, H, T, K], and the winning pairs' ranks in them."""
    num_half_keys = scores.shape[-1]
    half_keys = torch.arange(num_half_keys, device=scores.device)
    candidates = topk_lower_index_first(scores, half_keys, k)
    best = scores.gather(-1, candidates)
    first, second = _pairs_that_can_win(k, scores.device)
    slots = candidates[0][..., first] * num_half_keys + candidates[1][..., second]
    sums = best[0][..., first] + best[1][..., second]
    winners = topk_lower_index_first(sums, slots, k)
    return candidates, torch.stack((first[winners], second[winners]))


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
