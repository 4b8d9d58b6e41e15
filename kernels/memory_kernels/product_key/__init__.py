"""Exact top-k over the products of two sets of half-keys, without building the full keys."""

from memory_kernels.product_key.interface import product_key_scores, product_key_topk

__all__ = ["product_key_scores", "product_key_topk"]
