"""Weighted sums of table rows, and their adjoint: dot products with table rows."""

from memory_kernels.bag.interface import row_dot, weighted_bag

__all__ = ["row_dot", "weighted_bag"]
