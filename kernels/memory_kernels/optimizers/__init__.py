"""Optimizers whose work follows the rows that were read, on the gradients of `RowGradients`."""

from memory_kernels.optimizers.adagrad import RowAdagrad, RowWiseAdagrad
from memory_kernels.optimizers.adam import RowAdam
from memory_kernels.optimizers.base import RowOptimizer
from memory_kernels.optimizers.sgd import RowSGD

__all__ = [
    "RowAdagrad",
    "RowAdam",
    "RowOptimizer",
    "RowSGD",
    "RowWiseAdagrad",
]
