"""The public call. Axes: T tokens, H heads, N half-keys, K slots chosen a head."""

import torch
from torch import Tensor

from memory_kernels.checks import check_device, check_type
from memory_kernels.product_key import operators


def product_key_topk(
    query: Tensor, keys: Tensor, k: int, *, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The k best of N * N product keys for each head, with their weights.

    The key of slot i * N + j is the concatenation of half-keys i and j, so its score is the sum of
    two half scores and the full keys are never built. Scores are computed in fp32. Differentiable
    in query and keys. Product keys: Lample et al. 2019, section 3.2; heads as in "Memory Layers at
    Scale".

    Args:
        query: [T, H, Dk].
        keys: [H, 2, N, Dk / 2].
        k: slots a head, 1 <= k <= N.
        normalize: softmax the scores over each head's k slots; False returns the scores.

    Returns:
        indices [T, H, K] (int32 where N * N fits, else int64) and weights or scores [T, H, K] in
        fp32, best first; of equal scores, the lower index first.

    Raises:
        ValueError: shapes or devices that do not fit together, or k out of range.
    """
    _check(query, keys, k)
    weights, indices = operators.product_key_topk(query, keys, k, normalize)
    return indices, weights


def _check(query: Tensor, keys: Tensor, k: int) -> None:
    for name, tensor in (("query", query), ("keys", keys)):
        check_type(name, tensor, Tensor)
    if query.dim() != 3:
        raise ValueError(f"query: [T, H, Dk] wanted, got {list(query.shape)}")
    num_heads, key_dim = query.shape[1:]
    if keys.dim() != 4 or keys.shape[:2] != (num_heads, 2) or 2 * keys.shape[3] != key_dim:
        raise ValueError(
            f"keys: [H, 2, N, Dk / 2] = [{num_heads}, 2, N, {key_dim / 2:g}] wanted, got "
            f"{list(keys.shape)}"
        )
    check_device("keys", keys, query, "query")
    if not 1 <= k <= keys.shape[2]:
        raise ValueError(f"k: 1 to the {keys.shape[2]} half-keys wanted, got {k}")


def product_key_scores(query: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    """The scores of given slots, [T, H, K] in fp32.

    Args:
        query: [T, H, Dk].
        keys: [H, 2, N, Dk / 2].
        indices: [T, H, K], int32 or int64, each in [0, N * N).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        IndexError: on the CPU's torch path, indices out of range.
    """
    _check(query, keys, 1)
    check_type("indices", indices, Tensor)
    fits = indices.dim() == 3 and indices.shape[:2] == query.shape[:2]
    if not fits or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices: [{query.shape[0]}, {query.shape[1]}, K] int32 or int64 wanted, got "
            f"{list(indices.shape)} {indices.dtype}"
        )
    check_device("indices", indices, query, "query")
    return operators.product_key_scores(query, keys, indices)
