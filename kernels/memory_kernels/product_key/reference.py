"""Product-key retrieval as its definition says: all N * N scores, sorted. For tests and benchmarks.

Axes: T tokens, H heads, N half-keys, K slots chosen a head.
"""

import torch
from torch import Tensor


def product_key_scores_reference(query: Tensor, keys: Tensor) -> Tensor:
    """Scores of all slots, [T, H, N * N], slot (i, j) at i * N + j; query and keys as the public
    call."""
    first, second = query.unflatten(-1, (2, -1)).unbind(-2)
    scores_first = torch.einsum("thd,hnd->thn", first, keys[:, 0])
    scores_second = torch.einsum("thd,hnd->thn", second, keys[:, 1])
    return (scores_first[..., :, None] + scores_second[..., None, :]).flatten(-2)


def product_key_topk_reference(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and scores of the best k slots of each head, [T, H, K], the lower index first in a
    tie."""
    scores, indices = product_key_scores_reference(query, keys).sort(
        dim=-1, descending=True, stable=True
    )
    return indices[..., :k], scores[..., :k]
