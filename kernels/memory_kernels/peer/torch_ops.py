"""PEER's lookup on torch operators: the bag's sums with GELU between them.

Axes: T tokens, B experts read a token, S experts, D columns. Tables come as row chunks.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_kernels.bag import torch_ops as bag


def peer_experts(
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    shadow_u: Sequence[Tensor],
    shadow_v: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y and the products; see the operator of this name in operators.py."""
    products = bag.row_dot(u, indices, x, shadow_u)
    y, _ = bag.weighted_bag(v, indices, weights * F.gelu(products), None, shadow_v)
    return y, products


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
    """Gradients of weights and x; see the operator of this name in operators.py."""
    activations, slopes = gelu_and_slope(products)
    grad_sums = bag.row_dot(v, indices, grad_output, shadow_v)
    grad_products = grad_sums * weights * slopes
    if sinks_v:
        coefficients = weights * activations
        bag.bag_backward(v, indices, coefficients, grad_output, [], form, sinks_v, False)
        bag.bag_backward(u, indices, grad_products, x, [], form, sinks_u, False)
    grad_x, _ = bag.weighted_bag(u, indices, grad_products, None, shadow_u)
    return grad_sums * activations, grad_x


def gelu_and_slope(products: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(h) = h * Phi(h), and its derivative Phi(h) + h * phi(h); Phi, phi the normal
    distribution and its density."""
    phi = torch.exp(-0.5 * products.square()) / math.sqrt(2 * math.pi)
    cumulative = 0.5 * (1 + torch.erf(products / math.sqrt(2)))
    return products * cumulative, cumulative + products * phi
