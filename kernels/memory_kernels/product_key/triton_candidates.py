"""Candidates for the best half-keys: scores on tensor cores, which never leave the registers.

Axes: T tokens, H heads, N half-keys, K slots chosen a head. A row is one half of a head of a token:
row (t * H + h) * 2 + half. Candidates [rows, blocks, CAPACITY] are int64 (triton_select.py); their
counts [rows, blocks] say how many of a block hold, the others are undefined.

`half_candidates` scores a tile of tokens against a block of half-keys and keeps what may be among
the K best of the block. `narrow_candidates` does the same with the candidates of several blocks,
as often as it takes for one block to remain.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.choice import is_interpreted
from memory_kernels.launch import Launch, ceil_div, next_power_of_2
from memory_kernels.product_key.triton_select import (
    ordered_of,
    pack_candidates,
    place_best,
    to_ordered,
)

# Selection leaves room for 32 scores a thread, in 16 warps. Products of fp32, without tensor cores,
# need half of the registers themselves.
BLOCK_TOKENS = 64
BLOCK_KEYS = 256
BLOCK_KEYS_FP32 = 128
# Of `narrow_candidates`: candidates that become one block, and those of all rows of a tile, 64 bits
# each: 8 a thread of 8 warps.
NARROW_ENTRIES = 256
_NARROW_TILE = 2048
_LEAST_CAPACITY = 16
_SCORES_OF_A_WARP = 32 * 32


@triton.jit
def half_candidates_kernel(
    query,
    keys,
    candidates,
    counts,
    num_tokens,
    HALVES: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    UPCAST: tl.constexpr,
):
    num_blocks: tl.constexpr = (N + BLOCK_KEYS - 1) // BLOCK_KEYS
    # Blocks of half-keys change fastest: programs that run together share their queries.
    block = tl.program_id(0) % num_blocks
    tile = tl.program_id(0) // num_blocks
    num_tiles = tl.cdiv(num_tokens, BLOCK_TOKENS)
    half = tile // num_tiles
    token = (tile % num_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    index = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    # Beyond the edge the last one is read again, and dropped below.
    row = tl.minimum(token, num_tokens - 1).to(tl.int64) * HALVES + half
    key = half.to(tl.int64) * N + tl.minimum(index, N - 1)
    scores = tl.zeros([BLOCK_TOKENS, BLOCK_KEYS], tl.float32)
    for first in range(0, DIM, BLOCK_DIM):
        d = first + tl.arange(0, BLOCK_DIM)
        if DIM % BLOCK_DIM == 0:
            q = tl.load(query + row[:, None] * DIM + d[None, :])
            k = tl.load(keys + key[None, :] * DIM + d[:, None])
        else:
            q = tl.load(query + row[:, None] * DIM + d[None, :], mask=d[None, :] < DIM, other=0.0)
            k = tl.load(keys + key[None, :] * DIM + d[:, None], mask=d[:, None] < DIM, other=0.0)
        if UPCAST:  # the interpreter's product of bf16 is wrong
            q, k = q.to(tl.float32), k.to(tl.float32)
        scores = tl.dot(q, k, scores, input_precision="ieee")
    is_key = (index < N)[None, :]
    ordered = tl.where(is_key, to_ordered(scores), -2147483648)
    is_there = tl.broadcast_to(is_key, [BLOCK_TOKENS, BLOCK_KEYS])
    place, count = place_best(ordered, is_there, K, CAPACITY)
    # One address in 64 bits for the tile, offsets in 32: registers decide the size of the tile.
    first_token = (tile % num_tiles) * BLOCK_TOKENS
    out = (first_token.to(tl.int64) * HALVES + half) * num_blocks + block
    row_in_tile = tl.arange(0, BLOCK_TOKENS) * (HALVES * num_blocks)
    is_token = token < num_tokens
    tl.store(counts + out + row_in_tile, count, mask=is_token)
    tl.store(
        candidates + out * CAPACITY + (row_in_tile[:, None] * CAPACITY + place),
        pack_candidates(ordered, index[None, :]),
        mask=is_token[:, None] & (place < CAPACITY),
    )


@triton.jit
def narrow_candidates_kernel(
    candidates,
    counts,
    kept,
    kept_counts,
    num_rows,
    NUM_BLOCKS: tl.constexpr,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    num_tiles: tl.constexpr = (NUM_BLOCKS + TILE_BLOCKS - 1) // TILE_BLOCKS
    tile = tl.program_id(0) % num_tiles
    row = (tl.program_id(0) // num_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < num_rows
    row = row.to(tl.int64)
    entry = tl.arange(0, TILE_BLOCKS * CAPACITY)
    block = tile * TILE_BLOCKS + entry // CAPACITY
    held = tl.load(
        counts + row[:, None] * NUM_BLOCKS + block[None, :],
        mask=is_row[:, None] & (block < NUM_BLOCKS)[None, :],
        other=0,
    )
    is_there = (entry % CAPACITY)[None, :] < held
    first = (row * NUM_BLOCKS + tile * TILE_BLOCKS) * CAPACITY
    entries = tl.load(
        candidates + first[:, None] + entry[None, :], mask=is_there, other=-9223372036854775808
    )
    place, count = place_best(ordered_of(entries), is_there, K, CAPACITY)
    out = row * num_tiles + tile
    tl.store(kept_counts + out, count, mask=is_row)
    tl.store(
        kept + out[:, None] * CAPACITY + place, entries, mask=is_row[:, None] & (place < CAPACITY)
    )


def capacity(k: int, block_keys: int) -> int:
    """Candidates kept of a block: about twice as many as wanted make the bisection short."""
    return min(block_keys, max(_LEAST_CAPACITY, 2 * next_power_of_2(k)))


def keys_of_a_block(num_half_keys: int, dtype: torch.dtype) -> int:
    """Half-keys scored by one program."""
    most = BLOCK_KEYS_FP32 if dtype == torch.float32 else BLOCK_KEYS
    return min(most, max(16, next_power_of_2(num_half_keys)))


def plan_half_candidates(
    query: Tensor, keys: Tensor, candidates: Tensor, counts: Tensor, k: int
) -> Launch:
    """candidates [T * H * 2, blocks, CAPACITY] and counts [T * H * 2, blocks] of contiguous query
    and keys of one dtype."""
    num_tokens, num_heads, key_dim = query.shape
    num_half_keys = keys.shape[2]
    num_blocks, block_capacity = candidates.shape[1:]
    is_fp32 = query.dtype == torch.float32
    block_keys = keys_of_a_block(num_half_keys, query.dtype)
    block_tokens = min(BLOCK_TOKENS, max(16, next_power_of_2(num_tokens)))
    return Launch(
        kernel=half_candidates_kernel,
        grid=(ceil_div(num_tokens, block_tokens) * 2 * num_heads * num_blocks,),
        arguments=dict(
            query=query,
            keys=keys,
            candidates=candidates,
            counts=counts,
            num_tokens=num_tokens,
            HALVES=2 * num_heads,
            N=num_half_keys,
            DIM=key_dim // 2,
            K=k,
            CAPACITY=block_capacity,
            BLOCK_TOKENS=block_tokens,
            BLOCK_KEYS=block_keys,
            BLOCK_DIM=16 if is_fp32 else 64,
            UPCAST=is_interpreted(),
        ),
        num_warps=max(4, block_tokens * block_keys // _SCORES_OF_A_WARP),
        num_stages=3,
    )


def plan_narrow_candidates(
    candidates: Tensor, counts: Tensor, kept: Tensor, kept_counts: Tensor, k: int
) -> Launch:
    """kept [rows, tiles, CAPACITY] of candidates [rows, blocks, CAPACITY], with their counts."""
    num_rows, num_blocks, block_capacity = candidates.shape
    tile_blocks = blocks_of_a_tile(num_blocks, block_capacity)
    block_rows = min(next_power_of_2(num_rows), _NARROW_TILE // (tile_blocks * block_capacity))
    return Launch(
        kernel=narrow_candidates_kernel,
        grid=(ceil_div(num_rows, block_rows) * kept.shape[1],),
        arguments=dict(
            candidates=candidates,
            counts=counts,
            kept=kept,
            kept_counts=kept_counts,
            num_rows=num_rows,
            NUM_BLOCKS=num_blocks,
            K=k,
            CAPACITY=block_capacity,
            TILE_BLOCKS=tile_blocks,
            BLOCK_ROWS=block_rows,
        ),
        num_warps=8,
    )


def blocks_of_a_tile(num_blocks: int, block_capacity: int) -> int:
    """Blocks of candidates that become one."""
    return min(next_power_of_2(num_blocks), max(4, NARROW_ENTRIES // block_capacity))
