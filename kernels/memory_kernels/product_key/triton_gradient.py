"""Gradients of the retrieval for query and keys.

Axes: T tokens, H heads, N half-keys, K slots a head, B = T * H * 2 halves of tokens, D = Dk / 2.

With s[t, h, k] the gradient of a slot's score, query's is a weighted sum of K half-keys for each
half, and keys' is its transpose. Two routes, both in a fixed order. Bytes and operations of both
gradients for 16k tokens, 4 heads, K = 32, bf16, at 4.3 TB/s of memory, 5.5 of L2, 600 TFLOP/s:

| N, D | as matrix products with a matrix of s [B, N] | as bags of K rows |
|---|---|---|
| 1024, 256 | 4 passes over 268 MB and 137 GFLOP: .5 ms | 2 x 4.2M rows of 512 B, sorted: 1.1 ms |
| 1024, 1024 | 4 passes over 268 MB and 550 GFLOP: 1.2 ms | 2 x 4.2M rows of 2 KB, sorted: 3.5 ms |
| 4096, 256 | 4 passes over 1.1 GB and 550 GFLOP: 1.9 ms | 1.1 ms |
| 4096, 1024 | 4 passes over 1.1 GB and 2200 GFLOP: 4.7 ms | 3.5 ms |

So the matrix products serve up to 2048 half-keys, and the bags more, whose work does not grow with
N, and any number of slots. fp32 stays off tensor cores, where products cost ten times as much, and
always takes the bags.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.bag import operators as bag
from memory_kernels.launch import Launch, next_power_of_2

MOST_HALF_KEYS_OF_PRODUCTS = 2048
# Slots are compared in pairs, in registers: 256 would spill, and more than 1024 do not compile.
MOST_SLOTS_OF_PRODUCTS = 128
# Tokens are taken in chunks of as many as have a matrix of this size.
MATRIX_BYTES = 2**28


@triton.jit
def spread_gradient_kernel(
    indices,
    grad_scores,
    matrix,
    num_tokens,
    H: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # token * H + head
    k = tl.arange(0, WIDTH)
    is_slot = k < K
    slot = tl.load(indices + row * K + k, mask=is_slot, other=0)
    grad = tl.load(grad_scores + row * K + k, mask=is_slot, other=0.0)
    token = row // H
    head = row % H
    for half in tl.static_range(2):
        index = slot // N if half == 0 else slot % N
        # Slots share half-keys. Each of them gets the whole sum, so that any may write it.
        shared = (index[:, None] == index[None, :]) & is_slot[None, :]
        total = tl.sum(tl.where(shared, grad[None, :], 0.0), 1)
        out = ((head * 2 + half) * num_tokens + token) * N + index
        tl.store(matrix + out, total.to(matrix.dtype.element_ty), mask=is_slot)


def plan_spread_gradient(
    indices: Tensor, grad_scores: Tensor, matrix: Tensor, num_half_keys: int
) -> Launch:
    """Write gradients [T, H, K] of slots to the places of their half-keys in a matrix of zeros
    [H * 2, T, N], those of one half-key summed in fp32."""
    num_tokens, num_heads, k = indices.shape
    return Launch(
        kernel=spread_gradient_kernel,
        grid=(num_tokens * num_heads,),
        arguments=dict(
            indices=indices,
            grad_scores=grad_scores,
            matrix=matrix,
            num_tokens=num_tokens,
            H=num_heads,
            N=num_half_keys,
            K=k,
            WIDTH=next_power_of_2(k),
        ),
        num_warps=4 if k > 16 else 1,
    )


def gradients_by_products(
    query: Tensor, keys: Tensor, indices: Tensor, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of contiguous query [T, H, Dk] and keys [H, 2, N, D] of one dtype."""
    num_tokens = len(query)
    num_heads, _, num_half_keys, half_dim = keys.shape
    halves = 2 * num_heads
    flat_keys = keys.view(halves, num_half_keys, half_dim)
    flat_query = query.view(num_tokens, halves, half_dim)
    grad_query = torch.empty_like(flat_query)
    grad_keys = torch.zeros_like(flat_keys, dtype=torch.float32)
    tokens = max(1, MATRIX_BYTES // (halves * num_half_keys * query.element_size()))
    for first in range(0, num_tokens, tokens):
        part = slice(first, first + tokens)
        slots = indices[part]
        matrix = query.new_zeros(halves, len(slots), num_half_keys)
        plan_spread_gradient(slots, grad_scores[part], matrix, num_half_keys).run()
        grad_query[part] = torch.bmm(matrix, flat_keys).transpose(0, 1)
        grad_keys += _product_in_fp32(matrix.mT, flat_query[part].transpose(0, 1))
    return grad_query.view_as(query), grad_keys.view_as(keys).to(keys.dtype)


def _product_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm of half precision whose result is not rounded."""
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def gradients_by_bags(
    query: Tensor, keys: Tensor, indices: Tensor, grad_scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of contiguous query [T, H, Dk] and keys [H, 2, N, D] of one dtype."""
    half_dim = keys.shape[3]
    rows = half_key_rows(indices, keys)
    weights = grad_scores[:, :, None].expand(-1, -1, 2, -1).reshape(rows.shape)
    table = keys.view(-1, half_dim)
    grad_query, _ = bag.weighted_bag([table], rows, weights, None, [], "dense", [])
    grad_keys = torch.zeros_like(table)
    x = query.view(-1, half_dim)
    bag.bag_backward([table], rows, weights, x, [], "dense", [grad_keys], False)
    return grad_query.view_as(query), grad_keys.view_as(keys)


def half_key_rows(indices: Tensor, keys: Tensor) -> Tensor:
    """[T * H * 2, K] int32: the half-keys of slots [T, H, K] as rows of keys.view(-1, D)."""
    num_heads, _, num_half_keys, _ = keys.shape
    halves = torch.stack((indices // num_half_keys, indices % num_half_keys), dim=2).int()
    first_rows = torch.arange(2 * num_heads, dtype=torch.int32, device=keys.device) * num_half_keys
    return (halves + first_rows.view(num_heads, 2, 1)).flatten(0, 2)
