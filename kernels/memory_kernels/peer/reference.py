"""PEER's lookup as its definition says, for tests and benchmarks to compare with.

Axes: T tokens, B experts read a token, S experts, D columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def peer_experts_reference(
    u: Tensor, v: Tensor, indices: Tensor, weights: Tensor, x: Tensor
) -> Tensor:
    """y[t] = sum over b of weights[t, b] * gelu(x[t] . u[indices[t, b]]) * v[indices[t, b]]."""
    products = torch.einsum("td,tbd->tb", x, u[indices.long()])
    return torch.einsum("tb,tbd->td", weights * F.gelu(products), v[indices.long()])
