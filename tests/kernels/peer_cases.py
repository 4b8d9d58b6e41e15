"""Inputs of peer_experts."""

from typing import NamedTuple

import torch
from torch import Tensor

from tests.kernels.bag_cases import Shape

SHAPES = [
    Shape(tokens=1, bag=1, rows=1, columns=1),
    Shape(tokens=5, bag=6, rows=9, columns=3),
    Shape(tokens=9, bag=16, rows=11, columns=100),
    Shape(tokens=7, bag=3, rows=40, columns=257),
]
OPERANDS = ("u", "v", "weights", "x")
"""The operands that take gradients, in the order of the call."""


class Operands(NamedTuple):
    """Arguments of peer_experts."""

    u: Tensor
    v: Tensor
    indices: Tensor
    weights: Tensor
    x: Tensor

    def double(self) -> "Operands":
        """The same values in fp64, each a leaf of its own."""
        return self._map(lambda tensor: tensor.double())

    def to(self, device: str) -> "Operands":
        """The same values on a device, each a leaf of its own."""
        return self._map(lambda tensor: tensor.to(device), self.indices.to(device))

    def _map(self, function, indices: Tensor | None = None) -> "Operands":
        tensors = {name: function(getattr(self, name).detach()) for name in OPERANDS}
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        return Operands(indices=self.indices if indices is None else indices, **leaves)


def make_operands(shape: Shape, dtype: torch.dtype) -> Operands:
    """Products x . u of order one; every bag of two or more reads an expert twice."""
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64) * scale
        return values.to(dtype).requires_grad_()

    indices = torch.randint(shape.rows, (shape.tokens, shape.bag), generator=generator)
    if shape.bag > 1:
        indices[:, -1] = indices[:, 0]
    return Operands(
        u=draw(shape.rows, shape.columns, scale=shape.columns**-0.5),
        v=draw(shape.rows, shape.columns),
        indices=indices.int(),
        weights=draw(shape.tokens, shape.bag),
        x=draw(shape.tokens, shape.columns),
    )


def gradients(y: Tensor, operands: Operands, leaves=None) -> tuple[Tensor, ...]:
    """Gradients of a fixed function of y for the leaves (all operands unless given)."""
    upstream = torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    leaves = [getattr(operands, name) for name in OPERANDS] if leaves is None else leaves
    return torch.autograd.grad(y, leaves, upstream)
