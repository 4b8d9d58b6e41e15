"""The public calls. Axes: T tokens, B rows read a token, S rows of the table, D columns."""

import torch
import torch.nn.functional as F
from torch import Tensor

from memory_kernels.bag.autograd import RowDot, WeightedBag


def weighted_bag(
    table: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None = None,
    *,
    main_grad: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over b of weights[t, b] * table[indices[t, b]], times silu(gate[t]) if given.

    Args:
        table: [S, D], floating point.
        indices: [T, B], int32 or int64, each in [0, S).
        weights: [T, B], floating point.
        gate: [T, D] or None.
        main_grad: [S, D] or None. If given, backward adds the table's gradient to it in place
            (only the rows that were read) and autograd sees none.

    Returns:
        [T, D] in the table's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(table, indices, main_grad)
    _check_shape("weights", weights, tuple(indices.shape))
    if main_grad is not None:
        table, weights = table.detach(), _requiring_grad(weights)
    y = WeightedBag.apply(table, indices, weights, main_grad)
    if gate is None:
        return y
    _check_shape("gate", gate, tuple(y.shape))
    return (y * F.silu(gate)).to(y.dtype)


def row_dot(
    table: Tensor, indices: Tensor, x: Tensor, *, main_grad: Tensor | None = None
) -> Tensor:
    """h[t, b] = x[t] . table[indices[t, b]], the adjoint of `weighted_bag`.

    Args:
        table: [S, D], floating point.
        indices: [T, B], int32 or int64, each in [0, S).
        x: [T, D], floating point.
        main_grad: as in `weighted_bag`.

    Returns:
        [T, B] in the table's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(table, indices, main_grad)
    _check_shape("x", x, (indices.shape[0], table.shape[1]))
    if main_grad is not None:
        table, x = table.detach(), _requiring_grad(x)
    return RowDot.apply(table, indices, x, main_grad)


def _requiring_grad(operand: Tensor) -> Tensor:
    """Autograd runs backward, and with it the sum into main_grad, for such operands only."""
    return operand if operand.requires_grad else operand.detach().requires_grad_()


def _check(table: Tensor, indices: Tensor, main_grad: Tensor | None) -> None:
    if table.dim() != 2 or not table.is_floating_point():
        raise ValueError(f"table: [S, D] floating point wanted, got {_describe(table)}")
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: [T, B] int32 or int64 wanted, got {_describe(indices)}")
    if main_grad is not None:
        _check_shape("main_grad", main_grad, tuple(table.shape))


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name}: {list(shape)} floating point wanted, got {_describe(tensor)}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
