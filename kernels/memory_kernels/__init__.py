"""Operators of product-key memory layers in torch terms; needs torch (and triton on GPUs), knows no
framework."""

from memory_kernels.bag import RowGradients, merge_row_gradients, row_dot, weighted_bag
from memory_kernels.choice import use_kernels
from memory_kernels.peer import peer_experts
from memory_kernels.product_key import product_key_scores, product_key_topk
from memory_kernels.shadow import Fp8Shadow

__all__ = [
    "Fp8Shadow",
    "RowGradients",
    "merge_row_gradients",
    "peer_experts",
    "product_key_scores",
    "product_key_topk",
    "row_dot",
    "use_kernels",
    "weighted_bag",
]
