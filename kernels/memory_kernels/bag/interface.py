"""The public calls. Axes: T tokens, B rows read a token, S rows of the table, D columns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.bag import operators
from memory_kernels.bag.row_gradients import RowGradients
from memory_kernels.checks import check_device, check_type
from memory_kernels.chunks import as_chunks, describe, num_rows
from memory_kernels.shadow import Fp8Shadow

Table = Tensor | Sequence[Tensor]


def weighted_bag(
    table: Table,
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None = None,
    *,
    main_grad: Table | None = None,
    row_gradients: RowGradients | None = None,
    shadow: Fp8Shadow | None = None,
) -> Tensor:
    """y[t] = sum over b of weights[t, b] * table[indices[t, b]], times silu(gate[t]) if given.

    Args:
        table: [S, D], floating point; or a list of row chunks, all of one size but the last.
        indices: [T, B], int32 or int64, each in [0, S).
        weights: [T, B], floating point.
        gate: [T, D] or None.
        main_grad: cut as the table is, or None. If given, backward adds the table's gradient to it
            in place (only the rows that were read) and autograd sees none.
        row_gradients: buffers that backward fills with the rows read and their gradients; autograd
            sees none. Make new ones for every call.
        shadow: fp8 values to read in the table's place, forward and backward; the table still has
            the gradient.

    Returns:
        [T, D] in the table's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        IndexError: on the CPU's torch path, indices outside the table.
    """
    chunks = check_reads(table, indices)
    check_operand("weights", weights, tuple(indices.shape), chunks[0])
    if gate is not None:
        check_operand("gate", gate, (indices.shape[0], chunks[0].shape[1]), chunks[0])
    form, sinks = sinks_of(chunks, indices, main_grad, row_gradients)
    if form != "dense":
        chunks, weights = [chunk.detach() for chunk in chunks], requiring_grad(weights)
    y, _ = operators.weighted_bag(
        chunks, indices, weights, gate, shadow_tensors(shadow, chunks), form, sinks
    )
    return y


def row_dot(
    table: Table,
    indices: Tensor,
    x: Tensor,
    *,
    main_grad: Table | None = None,
    row_gradients: RowGradients | None = None,
    shadow: Fp8Shadow | None = None,
) -> Tensor:
    """h[t, b] = x[t] . table[indices[t, b]], the adjoint of `weighted_bag`.

    Args:
        table, indices, main_grad, row_gradients, shadow: as in `weighted_bag`.
        x: [T, D], floating point.

    Returns:
        [T, B] in the table's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        IndexError: on the CPU's torch path, indices outside the table.
    """
    chunks = check_reads(table, indices)
    check_operand("x", x, (indices.shape[0], chunks[0].shape[1]), chunks[0])
    form, sinks = sinks_of(chunks, indices, main_grad, row_gradients)
    if form != "dense":
        chunks, x = [chunk.detach() for chunk in chunks], requiring_grad(x)
    products = operators.row_dot(chunks, indices, x, shadow_tensors(shadow, chunks), form, sinks)
    return products.to(chunks[0].dtype)


def requiring_grad(operand: Tensor) -> Tensor:
    """Autograd runs backward, and with it the table's gradient, for such operands only."""
    return operand if operand.requires_grad else operand.detach().requires_grad_()


def sinks_of(
    chunks: list[Tensor],
    indices: Tensor,
    main_grad: Table | None,
    row_gradients: RowGradients | None,
) -> tuple[str, list[Tensor]]:
    """Form and sinks of the table's gradient, as operators.py takes them."""
    if main_grad is not None and row_gradients is not None:
        raise ValueError("main_grad and row_gradients: one destination of the gradient, not both")
    if main_grad is not None:
        buffers = as_chunks(main_grad, "main_grad")
        _check_cut("main_grad", buffers, chunks)
        return "main_grad", buffers
    if row_gradients is None:
        return "dense", []
    check_type("row_gradients", row_gradients, RowGradients)
    capacity, columns = row_gradients.gradients.shape
    least = min(indices.numel(), num_rows(chunks))
    if capacity < least or columns != chunks[0].shape[1]:
        raise ValueError(
            f"row_gradients: room for {least} rows of {chunks[0].shape[1]} columns wanted, got "
            f"{capacity} of {columns}; make it by RowGradients.empty(table, indices.numel())"
        )
    for buffer in row_gradients.buffers():
        check_device("row_gradients", buffer, chunks[0])
    return "rows", row_gradients.buffers()


def shadow_tensors(shadow: Fp8Shadow | None, chunks: list[Tensor]) -> list[Tensor]:
    """What operators take for a shadow, checked against the table."""
    if shadow is None:
        return []
    check_type("shadow", shadow, Fp8Shadow)
    _check_cut("shadow", shadow.values, chunks)
    return shadow.tensors()


def _check_cut(name: str, tensors: Sequence[Tensor], chunks: list[Tensor]) -> None:
    """Both cut into the same chunks."""
    if len(tensors) != len(chunks):
        raise ValueError(f"{name}: {len(chunks)} chunks wanted, as the table, got {len(tensors)}")
    for tensor, chunk in zip(tensors, chunks, strict=True):
        if tensor.shape != chunk.shape:
            raise ValueError(f"{name}: {list(chunk.shape)} wanted, got {describe(tensor)}")
        check_device(name, tensor, chunk)


def check_reads(table: Table, indices: Tensor, name: str = "table") -> list[Tensor]:
    """The table's chunks; a ValueError names the table or the indices that do not fit."""
    chunks = as_chunks(table, name)
    check_type("indices", indices, Tensor)
    if indices.dim() != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices: [T, B] int32 or int64 wanted, got {describe(indices)}")
    check_device("indices", indices, chunks[0])
    return chunks


def check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], chunk: Tensor) -> None:
    """A ValueError if it is not a floating point tensor of that shape, on the table's device."""
    check_type(name, tensor, Tensor)
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(f"{name}: {list(shape)} floating point wanted, got {describe(tensor)}")
    check_device(name, tensor, chunk)
