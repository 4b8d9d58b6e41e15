"""PEER's lookup as torch.library operators, with their autograd.

Tables, shadows, `form` and sinks as in bag/operators.py, each for u and for v.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.choice import uses_triton
from memory_kernels.peer import torch_ops


def _implementation(tensor: Tensor):
    if not uses_triton(tensor):
        return torch_ops
    from memory_kernels.peer import triton_ops  # needs triton, which not every machine has

    return triton_ops


@torch.library.custom_op("memory_kernels::peer_experts", mutates_args=())
def peer_experts(
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    shadow_u: Sequence[Tensor],
    shadow_v: Sequence[Tensor],
    form: str,
    sinks_u: Sequence[Tensor],
    sinks_v: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y [T, D] in v's dtype, and the products x . u [T, B] in fp32 (fp64 for fp64 tables)."""
    return _implementation(v[0]).peer_experts(u, v, indices, weights, x, shadow_u, shadow_v)


@peer_experts.register_fake
def _(u, v, indices, weights, x, shadow_u, shadow_v, form, sinks_u, sinks_v):
    y = v[0].new_empty(indices.shape[0], v[0].shape[1])
    return y, indices.new_empty(indices.shape, dtype=_accumulator(v[0]))


@torch.library.custom_op("memory_kernels::peer_backward", mutates_args={"sinks_u", "sinks_v"})
def peer_backward(
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    products: Tensor,
    grad_output: Tensor,
    shadow_u: Sequence[Tensor],
    shadow_v: Sequence[Tensor],
    form: str,
    sinks_u: Sequence[Tensor],
    sinks_v: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of weights [T, B] in fp32 and of x [T, D] in u's dtype; the tables' go to the
    sinks, which are empty where the tables need none."""
    return _implementation(v[0]).peer_backward(
        u,
        v,
        indices,
        weights,
        x,
        products,
        grad_output,
        shadow_u,
        shadow_v,
        form,
        sinks_u,
        sinks_v,
    )


@peer_backward.register_fake
def _(u, v, indices, weights, x, products, grad_output, *_):
    return torch.empty_like(products), x.new_empty(x.shape, dtype=u[0].dtype)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _save(ctx, inputs, output):
    u, v, indices, weights, x, shadow_u, shadow_v, form, sinks_u, sinks_v = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.form, ctx.sizes = form, [len(u), len(v), len(shadow_u), len(shadow_v)]
    # Not saved the usual way; see bag/operators.py.
    ctx.sinks_u, ctx.sinks_v = list(sinks_u), list(sinks_v)
    ctx.save_for_backward(indices, weights, x, output[1], *u, *v, *shadow_u, *shadow_v)


def _backward(ctx, grad_output, _grad_products):
    nothing_u, nothing_v, shadow_u, shadow_v = ([None] * size for size in ctx.sizes)
    ends = shadow_u, shadow_v, None, [None] * len(ctx.sinks_u), [None] * len(ctx.sinks_v)
    if grad_output is None:
        return nothing_u, nothing_v, None, None, None, *ends
    indices, weights, x, products, *tensors = ctx.saved_tensors
    u, v, shadow_u, shadow_v = _split(tensors, ctx.sizes)
    sinks_u, sinks_v = ctx.sinks_u, ctx.sinks_v
    dense = ctx.form == "dense" and any([*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]])
    if dense:
        sinks_u, sinks_v = ([torch.zeros_like(c) for c in chunks] for chunks in (u, v))
    grad_weights, grad_x = peer_backward(
        u,
        v,
        indices,
        weights,
        x,
        products,
        grad_output,
        shadow_u,
        shadow_v,
        ctx.form,
        sinks_u,
        sinks_v,
    )
    return (
        sinks_u if dense else nothing_u,
        sinks_v if dense else nothing_v,
        None,
        grad_weights.to(weights.dtype),
        grad_x.to(x.dtype),
        *ends,
    )


def _split(tensors: list, sizes: list[int]) -> list[list]:
    parts = []
    for size in sizes:
        parts.append(tensors[:size])
        tensors = tensors[size:]
    return parts


peer_experts.register_autograd(_backward, setup_context=_save)
