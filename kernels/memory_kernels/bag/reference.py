"""The bag and its adjoint as their definitions say, for tests and benchmarks to compare with.

Axes: T tokens, B rows read a token, S rows of the table, D columns.
"""

import torch
from torch import Tensor


def weighted_bag_reference(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """y[t] = sum over b of weights[t, b] * table[indices[t, b]]: [T, D], differentiable."""
    return torch.einsum("tb,tbd->td", weights, table[indices.long()])


def row_dot_reference(table: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """h[t, b] = x[t] . table[indices[t, b]]: [T, B], differentiable."""
    return torch.einsum("td,tbd->tb", x, table[indices.long()])
