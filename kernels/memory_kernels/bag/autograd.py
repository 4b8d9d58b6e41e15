"""Autograd of the bag and of the row dot, whose table gradient has two destinations.

A dense gradient as autograd returns it is as large as the table and is made anew in every call.
With `main_grad` the rows that were read are added to that buffer, and autograd is told of no
gradient.
"""

import torch
from torch import Tensor

from memory_kernels.bag.torch_ops import add_row_gradients, bag_dot, bag_sum


def _table_gradient(ctx, table: Tensor, indices: Tensor, weights: Tensor, x: Tensor):
    if ctx.main_grad is not None:
        add_row_gradients(ctx.main_grad, indices, weights, x)
        return None
    if not ctx.needs_input_grad[0]:
        return None
    gradient = torch.zeros_like(table)
    add_row_gradients(gradient, indices, weights, x)
    return gradient


class WeightedBag(torch.autograd.Function):
    """y[t] = sum over b of weights[t, b] * table[indices[t, b]]; see `weighted_bag`."""

    @staticmethod
    def forward(ctx, table, indices, weights, main_grad):
        ctx.save_for_backward(table, indices, weights)
        ctx.main_grad = main_grad
        return bag_sum(table, indices, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        table, indices, weights = ctx.saved_tensors
        grad_table = _table_gradient(ctx, table, indices, weights, grad_output)
        grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_weights = bag_dot(table, indices, grad_output).to(weights.dtype)
        return grad_table, None, grad_weights, None


class RowDot(torch.autograd.Function):
    """h[t, b] = x[t] . table[indices[t, b]]; see `row_dot`."""

    @staticmethod
    def forward(ctx, table, indices, x, main_grad):
        ctx.save_for_backward(table, indices, x)
        ctx.main_grad = main_grad
        return bag_dot(table, indices, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        table, indices, x = ctx.saved_tensors
        grad_table = _table_gradient(ctx, table, indices, grad_output, x)
        grad_x = None
        if ctx.needs_input_grad[2]:
            grad_x = bag_sum(table, indices, grad_output).to(x.dtype)
        return grad_table, None, grad_x, None
