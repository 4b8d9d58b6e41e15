"""The retrieval as torch.library operators, with their autograd.

Axes: T tokens, H heads, N half-keys, K slots chosen a head.
"""

import torch
from torch import Tensor

from memory_kernels.choice import uses_triton
from memory_kernels.product_key import torch_ops
from memory_kernels.product_key.torch_ops import slot_dtype


def _implementation(tensor: Tensor):
    if not uses_triton(tensor):
        return torch_ops
    from memory_kernels.product_key import triton_ops  # needs triton, which not every machine has

    return triton_ops


def score_dtype(query: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64."""
    return torch.promote_types(query.dtype, torch.float32)


@torch.library.custom_op("memory_kernels::product_key_topk", mutates_args=())
def product_key_topk(query: Tensor, keys: Tensor, k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """weights, or without `normalize` scores, and indices, [T, H, K] each, best first.

    Weights come first for torch.library.opcheck, which adds up the outputs.
    """
    return _implementation(query).topk(query, keys, k, normalize)


@product_key_topk.register_fake
def _(query, keys, k, normalize):
    shape = (*query.shape[:2], k)
    return (
        query.new_empty(shape, dtype=score_dtype(query)),
        query.new_empty(shape, dtype=slot_dtype(keys.shape[2])),
    )


@torch.library.custom_op("memory_kernels::product_key_scores", mutates_args=())
def product_key_scores(query: Tensor, keys: Tensor, indices: Tensor) -> Tensor:
    """The scores of given slots, [T, H, K]."""
    return _implementation(query).scores(query, keys, indices)


@product_key_scores.register_fake
def _(query, keys, indices):
    return query.new_empty(indices.shape, dtype=score_dtype(query))


@torch.library.custom_op("memory_kernels::product_key_backward", mutates_args=())
def product_key_backward(
    query: Tensor, keys: Tensor, indices: Tensor, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of query and keys, given those of the scores of slots [T, H, K], which may
    repeat."""
    return _implementation(query).gradients(query, keys, indices, grad_scores)


@product_key_backward.register_fake
def _(query, keys, indices, grad_scores):
    return query.new_empty(query.shape), keys.new_empty(keys.shape)


def _save_topk(ctx, inputs, output):
    query, keys, _, ctx.normalize = inputs
    weights, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(query, keys, indices, *([weights] if ctx.normalize else []))


def _topk_backward(ctx, grad, _grad_indices):
    query, keys, indices, *weights = ctx.saved_tensors
    if ctx.normalize:
        weighted = grad * weights[0]
        grad = weighted - weights[0] * weighted.sum(dim=-1, keepdim=True)
    return *product_key_backward(query, keys, indices, grad), None, None


def _save_scores(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _scores_backward(ctx, grad_scores):
    return *product_key_backward(*ctx.saved_tensors, grad_scores), None


product_key_topk.register_autograd(_topk_backward, setup_context=_save_topk)
product_key_scores.register_autograd(_scores_backward, setup_context=_save_scores)
