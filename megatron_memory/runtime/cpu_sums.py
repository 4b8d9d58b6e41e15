"""Gradients that torch's CPU kernels sum in bf16, summed in fp32.

A sum in bf16 stops growing at 256 times what is added. With 2048 tokens in a microbatch, the
gradient of an embedding's frequent row was off by up to 20%, that of a LayerNorm's weight by 33%
and of its bias by 72%; what else a model has (products of matrices, biases, RMSNorm, keys, tables)
torch sums in fp32, and is off by its own rounding, 0.4% (tests/runtime/test_cpu_sums.py).
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """`F.embedding`: the rows `ids` of weight [S, D]."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return F.embedding(ids, weight)
    return _Rows.apply(ids, weight)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (ids,), (gradient,) = ctx.saved_tensors, gradients
        rows, places = ids.flatten().unique(return_inverse=True)
        sums = gradient.new_zeros(len(rows), ctx.shape[1], dtype=torch.float32)
        sums.index_add_(0, places, gradient.reshape(-1, ctx.shape[1]).float())
        whole = gradient.new_zeros(ctx.shape)
        whole[rows] = sums.to(gradient.dtype)
        return None, whole


def layer_norm(
    x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, epsilon: float
) -> Tensor:
    """`F.layer_norm`, of numbers of one dtype."""
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return F.layer_norm(x, shape, weight, bias, epsilon)
    return _LayerNorm.apply(x, shape, weight, bias, epsilon)


class _LayerNorm(torch.autograd.Function):
    """Keeps x as it is for backward: its fp32 copy would be twice the memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, epsilon: float):
        ctx.save_for_backward(x, weight, bias)
        ctx.shape, ctx.epsilon = shape, epsilon
        normed = F.layer_norm(x.float(), shape, weight.float(), bias.float(), epsilon)
        return normed.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        leaves = [tensor.detach().float().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            normed = F.layer_norm(leaves[0], ctx.shape, leaves[1], leaves[2], ctx.epsilon)
        found = torch.autograd.grad(normed, leaves, gradients[0].float())
        x, weight, bias = (g.to(t.dtype) for g, t in zip(found, ctx.saved_tensors, strict=True))
        return x, None, weight, bias, None


class _Embedding(torch.nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


def install() -> None:
    """Let the imported megatron-core's embeddings, of words and of positions, use `embedding`."""
    import megatron.core.models.common.embeddings.language_model_embedding as model_embedding
    import megatron.core.tensor_parallel.layers as layers

    functional = types.SimpleNamespace(**vars(F))
    functional.embedding = embedding
    layers.F = functional
    _use_own_class(model_embedding.LanguageModelEmbedding)


def _use_own_class(model_embedding: type[torch.nn.Module]) -> None:
    initialize = model_embedding.__init__

    def initialize_with_own_class(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        for child in self.children():
            if type(child) is torch.nn.Embedding:
                child.__class__ = _Embedding

    model_embedding.__init__ = initialize_with_own_class  # type: ignore[assignment]
