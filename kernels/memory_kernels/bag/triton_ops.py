"""The bag's operators on Triton; the same functions as torch_ops.py has."""

from memory_kernels.bag.triton_forward import weighted_bag

__all__ = ["weighted_bag"]
