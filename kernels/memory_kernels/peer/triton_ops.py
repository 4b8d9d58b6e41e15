"""PEER's lookup on Triton: the bag's kernels with GELU between them, and one sort for both tables.

Axes: T tokens, B experts read a token, S experts, D columns. Tables come as row chunks.
"""

import torch
from torch import Tensor

from memory_kernels.bag import triton_ops as bag
from memory_kernels.bag.reads import sort_reads
from memory_kernels.bag.triton_backward import backward_of_reads
from memory_kernels.chunks import num_rows
from memory_kernels.peer.triton_gelu import plan_coefficient_gradients, plan_coefficients


def peer_experts(
    u: list[Tensor],
    v: list[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    shadow_u: list[Tensor],
    shadow_v: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """y and the products; see the operator of this name in operators.py."""
    products = bag.row_dot(u, indices, x, shadow_u)
    coefficients = _coefficients(products, weights.contiguous())
    y, _ = bag.weighted_bag(v, indices, coefficients, None, shadow_v)
    return y, products


def peer_backward(
    u: list[Tensor],
    v: list[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    products: Tensor,
    grad_output: Tensor,
    shadow_u: list[Tensor],
    shadow_v: list[Tensor],
    form: str,
    sinks_u: list[Tensor],
    sinks_v: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and x; see the operator of this name in operators.py."""
    weights, grad_output = weights.contiguous(), grad_output.contiguous()
    learns = len(sinks_v) > 0 and indices.numel() > 0
    if form == "rows" and indices.numel() == 0:
        sinks_u[-1].zero_(), sinks_v[-1].zero_()
    if learns:
        reads = sort_reads(indices, num_rows(u))
        coefficients = _coefficients(products, weights)
        grad_coefficients = backward_of_reads(
            v, reads, coefficients, grad_output, shadow_v, form, sinks_v, True
        )
    else:
        grad_coefficients = bag.row_dot(v, indices, grad_output, shadow_v)
    grad_weights, grad_products = torch.empty_like(products), torch.empty_like(products)
    plan_coefficient_gradients(
        grad_weights, grad_products, products, weights, grad_coefficients
    ).run()
    if learns:
        backward_of_reads(u, reads, grad_products, x.contiguous(), [], form, sinks_u, False)
    grad_x, _ = bag.weighted_bag(u, indices, grad_products, None, shadow_u)
    return grad_weights, grad_x


def _coefficients(products: Tensor, weights: Tensor) -> Tensor:
    """weights * gelu(products), [T, B] fp32."""
    coefficients = torch.empty_like(products)
    plan_coefficients(coefficients, products, weights).run()
    return coefficients
