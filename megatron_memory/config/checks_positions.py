"""Checks of flags that tell the model of positions and would have no effect."""

from collections.abc import Iterator

from megatron_memory.config.model import ModelConfig
from megatron_memory.config.schema import Config


def position_problems(config: Config) -> Iterator[str]:
    """Messages for flags that nothing reads."""
    model = config.model
    kind = model.position_embedding_type
    if kind != "rope":
        for flag in _rotary_flags(model):
            yield (
                f"{flag} has no effect with --position-embedding-type {kind}: give "
                f"--position-embedding-type rope, or omit {flag.split()[0]}."
            )
    elif not model.use_rope_scaling and (factor := _scaling_factor(model)) is not None:
        yield f"{factor} has no effect without --use-rope-scaling: add it, or omit the former."
    # Within a document, relative positions are the same.
    keeps_apart = config.data.reset_attention_mask
    if config.data.reset_position_ids and kind != "learned_absolute" and not keeps_apart:
        yield (
            f"--reset-position-ids has no effect with --position-embedding-type {kind}, which "
            "reads no positions: add --reset-attention-mask to keep documents apart, or omit it."
        )


def _rotary_flags(model: ModelConfig) -> Iterator[str]:
    """Those of rotary embeddings that are not at their defaults."""
    if model.rotary_base != 10000:
        yield f"--rotary-base {model.rotary_base}"
    if model.rotary_percent != 1.0:
        yield f"--rotary-percent {model.rotary_percent}"
    if model.rotary_interleaved:
        yield "--rotary-interleaved"
    if model.use_rope_scaling:
        yield "--use-rope-scaling"
    elif (factor := _scaling_factor(model)) is not None:
        yield factor


def _scaling_factor(model: ModelConfig) -> str | None:
    return (
        None
        if model.rope_scaling_factor == 8.0
        else (f"--rope-scaling-factor {model.rope_scaling_factor}")
    )
