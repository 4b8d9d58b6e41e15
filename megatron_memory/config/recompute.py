"""Activation recompute: less memory for more computation."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import option

RecomputeModule = Literal["core_attn", "layernorm", "memory", "mlp", "moe", "moe_act"]


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What the backward pass computes again instead of keeping it."""

    recompute_granularity: Literal["selective", "full"] | None = option(
        None, switches={"recompute_activations": "selective"}
    )
    """selective: the modules of --recompute-modules; full: whole layers."""
    recompute_modules: tuple[RecomputeModule, ...] | None = None
    """Modules that selective recompute covers. Without this flag: core_attn. memory: what memory
    layers compute after their routing, which is not computed again."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Full recompute: in groups of --recompute-num-layers over the whole model (uniform), or of
    the first --recompute-num-layers layers only (block)."""
    recompute_num_layers: int | None = option(None, at_least=1)
    """Full recompute: layers in a group (uniform), or layers to recompute (block)."""
