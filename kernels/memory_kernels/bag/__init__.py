"""Weighted sums of table rows, and their adjoint: dot products with table rows."""

from memory_kernels.bag.interface import row_dot, weighted_bag
from memory_kernels.bag.row_gradients import RowGradients, merge_row_gradients

__all__ = ["RowGradients", "merge_row_gradients", "row_dot", "weighted_bag"]
