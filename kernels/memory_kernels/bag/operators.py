"""The bag and the row dot as torch.library operators, with their autograd.

Axes: T tokens, B rows read a token, S rows of the table, D columns. Tables come as row chunks.

Where the table's gradient goes is told by `form` and `sinks`:

| form | sinks | backward |
|---|---|---|
| `dense` | none | returns a gradient of the table's size, as autograd has it |
| `main_grad` | a buffer a chunk | adds the rows read to the buffers, in place; autograd sees none |
| `rows` | the buffers of a `RowGradients` | writes the rows read and their gradients to them |

`shadow` is empty, or holds fp8 values (a chunk for each of the table's) and last their scales [S]:
they are read in the table's place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.bag import torch_ops
from memory_kernels.choice import uses_triton

FORMS = ("dense", "main_grad", "rows")


def _implementation(tensor: Tensor):
    if not uses_triton(tensor):
        return torch_ops
    from memory_kernels.bag import triton_ops  # needs triton, which not every machine has

    return triton_ops


@torch.library.custom_op("memory_kernels::weighted_bag", mutates_args=())
def weighted_bag(
    table: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    shadow: Sequence[Tensor],
    form: str,
    sinks: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y [T, D] in the table's dtype, and the sums before the gate ([0] without a gate)."""
    return _implementation(table[0]).weighted_bag(table, indices, weights, gate, shadow)


@weighted_bag.register_fake
def _(table, indices, weights, gate, shadow, form, sinks):
    y = table[0].new_empty(indices.shape[0], table[0].shape[1])
    return y, y.new_empty(0) if gate is None else torch.empty_like(y)


@torch.library.custom_op("memory_kernels::row_dot", mutates_args=())
def row_dot(
    table: Sequence[Tensor],
    indices: Tensor,
    x: Tensor,
    shadow: Sequence[Tensor],
    form: str,
    sinks: Sequence[Tensor],
) -> Tensor:
    """h [T, B] in fp32 (fp64 for an fp64 table)."""
    return _implementation(table[0]).row_dot(table, indices, x, shadow)


@row_dot.register_fake
def _(table, indices, x, shadow, form, sinks):
    return indices.new_empty(indices.shape, dtype=_accumulator(table[0]))


@torch.library.custom_op("memory_kernels::bag_backward", mutates_args={"sinks"})
def bag_backward(
    table: Sequence[Tensor],
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    shadow: Sequence[Tensor],
    form: str,
    sinks: Sequence[Tensor],
    with_dot: bool,
) -> Tensor:
    """Give the sinks the table's gradient, sum over reads of weights[t, b] * x[t] for each row.

    With the form `dense` the sinks are the chunks of a gradient of zeros.

    Returns:
        with_dot: x[t] . table[indices[t, b]], [T, B] as from `row_dot`, from the same pass over the
        rows; else [0].
    """
    return _implementation(x).bag_backward(
        table, indices, weights, x, shadow, form, sinks, with_dot
    )


@bag_backward.register_fake
def _(table, indices, weights, x, shadow, form, sinks, with_dot):
    return indices.new_empty(indices.shape if with_dot else 0, dtype=_accumulator(x))


@torch.library.custom_op("memory_kernels::gate_backward", mutates_args=())
def gate_backward(grad_output: Tensor, sums: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y = sums * silu(gate) for sums and gate, [T, D] each, contiguous."""
    return _implementation(sums).gate_gradients(grad_output, sums, gate)


@gate_backward.register_fake
def _(grad_output, sums, gate):
    return sums.new_empty(sums.shape), gate.new_empty(gate.shape)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _save(ctx, table, indices, others, shadow, form, sinks):
    ctx.num_chunks = len(table)
    ctx.form, ctx.num_shadows = form, len(shadow)
    # Not saved the usual way: every reader of a table adds to the same buffers in its backward,
    # which autograd would take for a change of something saved.
    ctx.sinks = list(sinks)
    ctx.save_for_backward(indices, *others, *table, *shadow)


def _saved(ctx, num_others: int):
    indices, *rest = ctx.saved_tensors
    others, tensors = rest[:num_others], rest[num_others:]
    return indices, others, tensors[: ctx.num_chunks], tensors[ctx.num_chunks :]


def _gradient_of_table(ctx, table, indices, weights, x, shadow, with_dot: bool):
    """Gradients of the chunks, or Nones with the gradient in the sinks; and the dots."""
    needs_table = ctx.form != "dense" or any(ctx.needs_input_grad[0])
    nothing = [None] * len(table)
    if not needs_table:
        return nothing, row_dot(table, indices, x, shadow, "dense", []) if with_dot else None
    sinks = ctx.sinks
    if ctx.form == "dense":
        sinks = [torch.zeros_like(chunk) for chunk in table]
    dots = bag_backward(table, indices, weights, x, shadow, ctx.form, sinks, with_dot)
    return sinks if ctx.form == "dense" else nothing, dots


def _save_bag(ctx, inputs, output):
    table, indices, weights, gate, shadow, form, sinks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    others = [weights] if gate is None else [weights, gate, output[1]]
    ctx.num_others = len(others)
    _save(ctx, table, indices, others, shadow, form, sinks)


def _bag_backward(ctx, grad_output, _grad_sums):
    nothing = [None] * ctx.num_chunks, None, None, None
    ends = [None] * ctx.num_shadows, None, [None] * len(ctx.sinks)
    if grad_output is None:
        return *nothing, *ends
    indices, (weights, *gated), table, shadow = _saved(ctx, ctx.num_others)
    grad_gate = None
    grad_sums = grad_output
    if gated:
        gate, sums = gated
        grad_sums, grad_gate = gate_backward(grad_output, sums, gate)
    with_dot = ctx.needs_input_grad[2]
    grad_table, dots = _gradient_of_table(ctx, table, indices, weights, grad_sums, shadow, with_dot)
    grad_weights = dots.to(weights.dtype) if with_dot else None
    return grad_table, None, grad_weights, grad_gate, *ends


def _save_dot(ctx, inputs, output):
    table, indices, x, shadow, form, sinks = inputs
    _save(ctx, table, indices, [x], shadow, form, sinks)


def _dot_backward(ctx, grad_output):
    indices, (x,), table, shadow = _saved(ctx, 1)
    grad_table, _ = _gradient_of_table(ctx, table, indices, grad_output, x, shadow, False)
    grad_x = None
    if ctx.needs_input_grad[2]:
        grad_x, _ = weighted_bag(table, indices, grad_output, None, shadow, "dense", [])
        grad_x = grad_x.to(x.dtype)
    return grad_table, None, grad_x, [None] * ctx.num_shadows, None, [None] * len(ctx.sinks)


weighted_bag.register_autograd(_bag_backward, setup_context=_save_bag)
row_dot.register_autograd(_dot_backward, setup_context=_save_dot)
