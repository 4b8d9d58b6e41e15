"""The bag's operators on Triton; the same functions as torch_ops.py has."""

from memory_kernels.bag.triton_backward import bag_backward
from memory_kernels.bag.triton_dot import row_dot
from memory_kernels.bag.triton_forward import weighted_bag
from memory_kernels.bag.triton_gate import gate_gradients

__all__ = ["bag_backward", "gate_gradients", "row_dot", "weighted_bag"]
