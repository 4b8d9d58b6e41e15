"""Operators of product-key memory layers in torch terms; needs torch only, knows no framework."""

from memory_kernels.bag import row_dot, weighted_bag
from memory_kernels.product_key import product_key_scores, product_key_topk

__all__ = ["product_key_scores", "product_key_topk", "row_dot", "weighted_bag"]
