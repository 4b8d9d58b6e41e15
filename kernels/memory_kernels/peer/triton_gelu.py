"""Between the two lookups of PEER: GELU of the products, times the weights; and its gradient.

Axes: T tokens, B experts read a token. Everything here is [T, B], small beside the rows read.
"""

import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.launch import Launch, ceil_div

_BLOCK = 1024
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution, 1 / sqrt(2 pi)


@triton.jit
def coefficients_kernel(coefficients, products, weights, num_reads, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_reads
    h = tl.load(products + offset, mask=mask, other=0.0)
    w = tl.load(weights + offset, mask=mask, other=0.0).to(tl.float32)
    cumulative = 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
    tl.store(coefficients + offset, w * h * cumulative, mask=mask)


@triton.jit
def coefficient_gradients_kernel(
    grad_weights,
    grad_products,
    products,
    weights,
    grad_coefficients,
    num_reads,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < num_reads
    h = tl.load(products + offset, mask=mask, other=0.0)
    w = tl.load(weights + offset, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_coefficients + offset, mask=mask, other=0.0)
    cumulative = 0.5 * (1.0 + tl.erf(h * _SQRT_HALF))
    slope = cumulative + h * _DENSITY_AT_0 * tl.exp(-0.5 * h * h)
    tl.store(grad_weights + offset, grad * h * cumulative, mask=mask)
    tl.store(grad_products + offset, grad * w * slope, mask=mask)


def plan_coefficients(coefficients: Tensor, products: Tensor, weights: Tensor) -> Launch:
    """coefficients = weights * gelu(products), [T, B] each, contiguous."""
    return Launch(
        kernel=coefficients_kernel,
        grid=(ceil_div(products.numel(), _BLOCK),),
        arguments=dict(
            coefficients=coefficients,
            products=products,
            weights=weights,
            num_reads=products.numel(),
            BLOCK=_BLOCK,
        ),
    )


def plan_coefficient_gradients(
    grad_weights: Tensor,
    grad_products: Tensor,
    products: Tensor,
    weights: Tensor,
    grad_coefficients: Tensor,
) -> Launch:
    """Gradients of weights and products from that of the coefficients, [T, B] each, contiguous."""
    return Launch(
        kernel=coefficient_gradients_kernel,
        grid=(ceil_div(products.numel(), _BLOCK),),
        arguments=dict(
            grad_weights=grad_weights,
            grad_products=grad_products,
            products=products,
            weights=weights,
            grad_coefficients=grad_coefficients,
            num_reads=products.numel(),
            BLOCK=_BLOCK,
        ),
    )
