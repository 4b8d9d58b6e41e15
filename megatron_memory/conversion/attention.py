"""Query, key and value projections: fused in Megatron, apart elsewhere, and how pairs are rotated.

Megatron's fused rows: for each key/value head its query heads, its key, its value. Rotary
embeddings turn pairs of a head's channels: adjacent ones (0, 1), (2, 3), as Meta's Llama does and
`--rotary-interleaved`, or the two halves (0, n/2), (1, n/2 + 1), as Hugging Face's models do. A
model of one kind becomes one of the other by a permutation of the rows of its queries and keys.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def fuse_qkv(parts: Sequence[Tensor], num_groups: int, channels: int) -> Tensor:
    """q [heads * channels, ...], k and v [num_groups * channels, ...] to Megatron's rows."""
    heads = [part.reshape(num_groups, -1, channels, *part.shape[1:]) for part in parts]
    return torch.cat(heads, dim=1).reshape(-1, *parts[0].shape[1:])


def split_qkv(fused: Tensor, num_groups: int, channels: int) -> list[Tensor]:
    """The reverse of `fuse_qkv`."""
    heads = fused.reshape(num_groups, -1, channels, *fused.shape[1:])
    parts = heads.split((heads.shape[1] - 2, 1, 1), dim=1)
    return [part.reshape(-1, *fused.shape[1:]) for part in parts]


def pairs_to_halves(rows: Tensor, channels: int) -> Tensor:
    """Rows [heads * channels, ...] for adjacent pairs to rows for the two halves."""
    pairs = rows.reshape(-1, channels // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def halves_to_pairs(rows: Tensor, channels: int) -> Tensor:
    """The reverse of `pairs_to_halves`."""
    halves = rows.reshape(-1, 2, channels // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)
