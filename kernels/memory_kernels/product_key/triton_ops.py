"""The retrieval's operators on Triton; the same functions as torch_ops.py has.

Axes: T tokens, H heads, N half-keys, K slots chosen a head.
"""

import torch
from torch import Tensor

from memory_kernels.bag import operators as bag
from memory_kernels.launch import ceil_div
from memory_kernels.product_key import triton_gradient
from memory_kernels.product_key.torch_ops import slot_dtype
from memory_kernels.product_key.triton_candidates import (
    blocks_of_a_tile,
    capacity,
    keys_of_a_block,
    plan_half_candidates,
    plan_narrow_candidates,
)
from memory_kernels.product_key.triton_pairs import plan_best_pairs, plan_sort_halves

# Candidates of so many tokens at a time: enough to fill a GPU, and no [T, H, N] in disguise.
CANDIDATE_BYTES = 2**28
_MOST_HALF_KEYS = 2**16  # slots are compared as 32 bits
_MOST_K = 64


def topk(query: Tensor, keys: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """weights and indices; see the operator product_key_topk in operators.py.

    A NaN score counts as the best. With scores that are not NaN this equals the torch path.

    Raises:
        ValueError: more half-keys or slots a head than the kernels take.
    """
    query, keys = _operands(query, keys)
    num_tokens, num_heads, _ = query.shape
    num_half_keys = keys.shape[2]
    if num_half_keys > _MOST_HALF_KEYS or k > _MOST_K:
        raise ValueError(
            f"product_key_topk: on Triton at most {_MOST_HALF_KEYS} half-keys and k = {_MOST_K}, "
            f"got {num_half_keys} and k = {k}; the torch path takes more: "
            'use_kernels("torch")'
        )
    indices = query.new_empty(num_tokens, num_heads, k, dtype=slot_dtype(num_half_keys))
    weights = query.new_empty(num_tokens, num_heads, k, dtype=torch.float32)
    block_keys = keys_of_a_block(num_half_keys, query.dtype)
    entries = ceil_div(num_half_keys, block_keys) * capacity(k, block_keys)
    tokens = max(1, CANDIDATE_BYTES // (2 * num_heads * entries * 8))
    for first in range(0, num_tokens, tokens):
        part = slice(first, first + tokens)
        half_scores, half_indices = _best_half_keys(query[part], keys, k)
        plan_best_pairs(
            half_scores, half_indices, indices[part], weights[part], num_half_keys, normalize
        ).run()
    return weights, indices


def _best_half_keys(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices of the K best half-keys, fp32 and int32 [T * H * 2, K], best first."""
    num_rows = query.shape[0] * query.shape[1] * 2
    block_keys = keys_of_a_block(keys.shape[2], query.dtype)
    kept = capacity(k, block_keys)

    def empty(num_blocks: int) -> tuple[Tensor, Tensor]:
        return (
            query.new_empty(num_rows, num_blocks, kept, dtype=torch.int64),
            query.new_empty(num_rows, num_blocks, dtype=torch.int32),
        )

    candidates, counts = empty(ceil_div(keys.shape[2], block_keys))
    plan_half_candidates(query, keys, candidates, counts, k).run()
    while (num_blocks := candidates.shape[1]) > 1:
        narrowed = empty(ceil_div(num_blocks, blocks_of_a_tile(num_blocks, kept)))
        plan_narrow_candidates(candidates, counts, *narrowed, k).run()
        candidates, counts = narrowed
    half_scores = query.new_empty(num_rows, k, dtype=torch.float32)
    half_indices = query.new_empty(num_rows, k, dtype=torch.int32)
    plan_sort_halves(candidates, counts, half_scores, half_indices).run()
    return half_scores, half_indices


def scores(query: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    """Scores of given slots; see the operator product_key_scores in operators.py."""
    query, keys = _operands(query, keys)
    half_dim = keys.shape[3]
    rows = triton_gradient.half_key_rows(indices, keys)
    x = query.view(-1, half_dim)
    products = bag.row_dot([keys.view(-1, half_dim)], rows, x, [], "dense", [])
    return products.view(*indices.shape[:2], 2, indices.shape[2]).sum(dim=2)


def gradients(
    query: Tensor, keys: Tensor, indices: Tensor, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys; see the operator product_key_backward in operators.py."""
    dtypes = query.dtype, keys.dtype
    query, keys = _operands(query, keys)
    is_half_precision = query.element_size() == 2
    few = (
        keys.shape[2] <= triton_gradient.MOST_HALF_KEYS_OF_PRODUCTS
        and indices.shape[2] <= triton_gradient.MOST_SLOTS_OF_PRODUCTS
    )
    route = (
        triton_gradient.gradients_by_products
        if is_half_precision and few
        else triton_gradient.gradients_by_bags
    )
    results = route(query, keys, indices.contiguous(), grad_scores.contiguous())
    return results[0].to(dtypes[0]), results[1].to(dtypes[1])


def _operands(query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Both contiguous and in one dtype, which holds the values of either."""
    dtype = torch.promote_types(query.dtype, keys.dtype)
    return query.to(dtype).contiguous(), keys.to(dtype).contiguous()
