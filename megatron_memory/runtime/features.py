"""Which accelerated parts megatron-core has found: Transformer Engine and Apex."""

from importlib.util import find_spec

from megatron_memory.exceptions import ConfigurationError


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed."""
    return find_spec("transformer_engine") is not None


def has_apex() -> bool:
    """Whether NVIDIA's Apex is installed with the kernel that adds weight gradients in place."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None


def transformer_engine_spec_provider():
    """Megatron's provider of Transformer Engine's layers.

    Raises:
        ConfigurationError: Transformer Engine is not installed.
    """
    if not has_transformer_engine():
        raise ConfigurationError(
            "--transformer-impl transformer_engine: it is not installed. Use --transformer-impl "
            "local, or: pip install --no-build-isolation 'transformer-engine[pytorch]'"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
