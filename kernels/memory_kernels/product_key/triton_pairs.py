"""From candidates to slots: the best half-keys in order, and the best of their pairs.

Axes: T tokens, H heads, N half-keys, K slots chosen a head, P pairs that can win. Half lists are
[T * H * 2, K], best first. Only pairs of ranks with (i + 1)(j + 1) <= K can win, 119 of 1024 for
K = 32: any other is below K pairs that are no worse.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.product_key.torch_ops import pairs_that_can_win
from memory_kernels.product_key.triton_select import (
    from_ordered,
    index_of,
    ordered_of,
    pack_candidates,
    to_ordered,
)

# Entries that a program sorts, over all of its rows: 8 a thread of 4 warps.
_SORTED_ENTRIES = 1024


@triton.jit
def sort_halves_kernel(
    candidates,
    counts,
    half_scores,
    half_indices,
    num_rows,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    row = row.to(tl.int64)
    entry = tl.arange(0, CAPACITY)
    held = tl.load(counts + row, mask=is_row, other=0)
    entries = tl.load(
        candidates + row[:, None] * CAPACITY + entry[None, :],
        mask=entry[None, :] < held[:, None],
        other=-9223372036854775808,
    )
    best = tl.topk(entries, WIDTH)
    rank = tl.arange(0, WIDTH)
    out = row[:, None] * K + rank[None, :]
    is_out = is_row[:, None] & (rank < K)[None, :]
    tl.store(half_scores + out, from_ordered(ordered_of(best)), mask=is_out)
    tl.store(half_indices + out, index_of(best).to(tl.int32), mask=is_out)


@triton.jit
def best_pairs_kernel(
    half_scores,
    half_indices,
    pairs,
    indices,
    weights,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    row = row.to(tl.int64)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < NUM_PAIRS
    i = tl.load(pairs + pair, mask=is_pair, other=0)
    j = tl.load(pairs + NUM_PAIRS + pair, mask=is_pair, other=0)
    first = row[:, None] * (2 * K) + i[None, :]
    second = row[:, None] * (2 * K) + K + j[None, :]
    is_there = is_row[:, None] & is_pair[None, :]
    sums = tl.load(half_scores + first, mask=is_there, other=0.0)
    sums += tl.load(half_scores + second, mask=is_there, other=0.0)
    slot = tl.load(half_indices + first, mask=is_there, other=0).to(tl.int64) * N
    slot += tl.load(half_indices + second, mask=is_there, other=0)
    entries = pack_candidates(to_ordered(sums), slot)
    best = tl.topk(tl.where(is_there, entries, -9223372036854775808), WIDTH)
    scores = from_ordered(ordered_of(best))
    rank = tl.arange(0, WIDTH)
    is_chosen = (rank < K)[None, :]
    if NORMALIZE:
        scores = tl.where(is_row[:, None], scores, 0.0)
        scores = tl.where(is_chosen, scores, float("-inf"))
        powers = tl.exp(scores - tl.max(scores, 1)[:, None])
        scores = powers / tl.sum(powers, 1)[:, None]
    out = row[:, None] * K + rank[None, :]
    is_out = is_row[:, None] & is_chosen
    tl.store(weights + out, scores, mask=is_out)
    tl.store(indices + out, index_of(best).to(indices.dtype.element_ty), mask=is_out)


def plan_sort_halves(
    candidates: Tensor, counts: Tensor, half_scores: Tensor, half_indices: Tensor
) -> Launch:
    """Half lists, fp32 and int32 [T * H * 2, K], of candidates [T * H * 2, 1, CAPACITY]."""
    num_rows, k = half_scores.shape
    capacity = candidates.shape[2]
    block_rows = min(max(1, _SORTED_ENTRIES // capacity), next_power_of_2(num_rows))
    return Launch(
        kernel=sort_halves_kernel,
        grid=(ceil_div(num_rows, block_rows),),
        arguments=dict(
            candidates=candidates,
            counts=counts,
            half_scores=half_scores,
            half_indices=half_indices,
            num_rows=num_rows,
            K=k,
            WIDTH=next_power_of_2(k),
            CAPACITY=capacity,
            BLOCK_ROWS=block_rows,
        ),
    )


def plan_best_pairs(
    half_scores: Tensor,
    half_indices: Tensor,
    indices: Tensor,
    weights: Tensor,
    num_half_keys: int,
    normalize: bool,
) -> Launch:
    """indices and weights [T, H, K] (scores, if not normalize) of sorted half lists."""
    num_tokens, num_heads, k = indices.shape
    pairs = pair_table(k, half_scores.device)
    width = next_power_of_2(pairs.shape[1])
    num_rows = num_tokens * num_heads
    block_rows = min(max(1, _SORTED_ENTRIES // width), next_power_of_2(num_rows))
    return Launch(
        kernel=best_pairs_kernel,
        grid=(ceil_div(num_rows, block_rows),),
        arguments=dict(
            half_scores=half_scores,
            half_indices=half_indices,
            pairs=pairs,
            indices=indices,
            weights=weights,
            num_rows=num_rows,
            N=num_half_keys,
            K=k,
            WIDTH=next_power_of_2(k),
            NUM_PAIRS=pairs.shape[1],
            PAIRS=width,
            BLOCK_ROWS=block_rows,
            NORMALIZE=normalize,
        ),
    )


@functools.lru_cache(maxsize=64)
def pair_table(k: int, device: torch.device) -> Tensor:
    """[2, P] int32: ranks i and j of the pairs that can win."""
    ranks = torch.stack(pairs_that_can_win(k, torch.device("cpu"))).int()
    return torch.empty_like(ranks, device=device) if device.type == "meta" else ranks.to(device)
