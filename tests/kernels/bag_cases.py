"""Inputs of the bag and the row dot, and how far a result may be from the exact one."""

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """T tokens, B rows read a token, S rows of the table, D columns."""

    tokens: int
    bag: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"T{self.tokens}-B{self.bag}-S{self.rows}-D{self.columns}"


SHAPES = [
    Shape(tokens=1, bag=1, rows=1, columns=1),
    Shape(tokens=1, bag=5, rows=9, columns=3),
    Shape(tokens=9, bag=1, rows=11, columns=100),
    Shape(tokens=5, bag=6, rows=4, columns=257),
    Shape(tokens=33, bag=32, rows=1000, columns=64),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INDEX_DTYPES = [torch.int32, torch.int64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Operands with values of order one; bags hold duplicates wherever they are large enough."""

    table: Tensor
    indices: Tensor
    weights: Tensor
    x: Tensor
    gate: Tensor

    def to(self, device: str) -> "Case":
        """The case on a device, its tensors leaves again."""
        tensors = {name: tensor.detach().to(device) for name, tensor in vars(self).items()}
        for tensor in tensors.values():
            tensor.requires_grad_(tensor.is_floating_point())
        return Case(**tensors)

    def exact(self) -> "Case":
        """The same values in fp64, each a leaf of its own."""
        names = ("table", "weights", "x", "gate")
        leaves = {n: getattr(self, n).detach().double().requires_grad_() for n in names}
        return Case(indices=self.indices, **leaves)


def make_case(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    index_dtype: torch.dtype = torch.int64,
    pattern: str = "random",
) -> Case:
    """A case whose tensors all take gradients.

    Args:
        pattern: of the indices: `random` with a duplicate in every bag of two or more, `one row`
            read by all tokens, or `same bag` for every token.
    """
    generator = torch.Generator().manual_seed(7)

    def draw(*size: int) -> Tensor:
        values = torch.randn(*size, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    indices = torch.randint(shape.rows, (shape.tokens, shape.bag), generator=generator)
    if pattern == "random" and shape.bag > 1:
        indices[:, -1] = indices[:, 0]
    elif pattern == "one row":
        indices[:] = shape.rows - 1
    elif pattern == "same bag":
        indices[:] = indices[0].clone()
    return Case(
        table=draw(shape.rows, shape.columns),
        indices=indices.to(index_dtype),
        weights=draw(shape.tokens, shape.bag),
        x=draw(shape.tokens, shape.columns),
        gate=draw(shape.tokens, shape.columns),
    )


def assert_rounded(name: str, ours: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """ours may be off by the rounding of a sum in fp32 (fp64), and of the result to its own dtype.

    Args:
        exact: in fp64.
        magnitude: the sum of the terms' absolute values, which rounding is relative to.
        terms: largest number of terms in a sum; each addition and product rounds once.
    """
    accumulator = torch.promote_types(ours.dtype, torch.float32)
    bound = (terms + 2) * torch.finfo(accumulator).eps * magnitude
    if ours.dtype != accumulator:
        limits = torch.finfo(ours.dtype)
        # Below the smallest normal number the spacing is constant.
        bound = bound + limits.eps * exact.abs().clamp(min=limits.smallest_normal)
    error = (ours.double() - exact).abs()
    assert (error <= bound).all(), f"{name}: off by {(error - bound).max():.2e} more than rounding"
