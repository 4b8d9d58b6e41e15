"""Norms for megatron-core's local layers, which its own torch norms cannot be under sequence
parallelism."""

import torch
from megatron.core.transformer import TransformerConfig

from megatron_memory.runtime.cpu_sums import layer_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; under sequence parallelism Megatron sums its gradient over the ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, **_factory_options(config))
        _mark_sequence_parallel(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm; under sequence parallelism Megatron sums its gradients over the ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(hidden_size, eps=eps, **_factory_options(config))
        _mark_sequence_parallel(self, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden size], normalised."""
        return layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def norm_class(config: TransformerConfig) -> type[torch.nn.Module]:
    """The norm that the configuration names."""
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]


def _factory_options(config: TransformerConfig) -> dict:
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    return dict(dtype=config.params_dtype, device=device)


def _mark_sequence_parallel(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)
