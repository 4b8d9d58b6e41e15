"""The decoder: a dense or mixture-of-experts GPT, which memory layers may extend."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import derived, fill_derived, option


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and blocks of the decoder. Names and defaults are Megatron-LM's.

    Fields marked as derived are computed on construction where they are None, so that readers
    always find numbers. `dataclasses.replace` keeps the numbers computed before.
    """

    num_layers: int = option(at_least=1, at_most=1024)
    """Number of decoder layers."""
    hidden_size: int = option(at_least=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = derived(
        "4 x --hidden-size, or with --swiglu 8/3 x --hidden-size, down to a multiple of 64",
        at_least=1,
    )
    """Inner width of an MLP."""
    num_attention_heads: int = option(at_least=1)
    """Number of attention (query) heads."""
    group_query_attention: bool = False
    """Grouped-query attention. With --num-query-groups given it is understood."""
    num_query_groups: int = derived(
        "1 with --group-query-attention, else --num-attention-heads", at_least=1
    )
    """Number of key/value heads, each shared by an equal number of query heads."""
    kv_channels: int = derived("--hidden-size / --num-attention-heads", at_least=1)
    """Width of one attention head."""
    seq_length: int = option(at_least=1)
    """Tokens in a training sequence."""
    max_position_embeddings: int = derived("--seq-length", at_least=1)
    """Largest number of positions the model accepts; the size of a learned position table."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = option(
        "learned_absolute",
        not_here={
            "yarn": "only plain rotary embeddings are built; use rope",
            "mrope": "it serves images and video; use rope",
            "relative": "it serves T5 models; use rope",
        },
        switches={"use_rotary_position_embeddings": "rope"},
    )
    """How a token's position enters the model."""
    rotary_base: int = option(10000, at_least=1)
    """Base period of rotary embeddings (rope theta)."""
    rotary_percent: float = option(1.0, above=0, at_most=1)
    """Part of each head's channels that rotary embeddings turn."""
    rotary_interleaved: bool = False
    """Rotate adjacent pairs of channels, as Meta's Llama does, instead of the two halves."""
    use_rope_scaling: bool = False
    """Lower the frequencies of rotary embeddings for long contexts, as Llama 3.1 and later do."""
    rope_scaling_factor: float = option(8.0, above=0)
    """By how much --use-rope-scaling lowers the lowest frequencies."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm before each block and at the end."""
    norm_epsilon: float = option(1e-5, above=0, synonyms=("layernorm_epsilon",))
    """Epsilon of every norm."""
    swiglu: bool = False
    """Gated MLPs with SiLU instead of GELU."""
    disable_bias_linear: bool = False
    """No bias in the linear layers of attention and MLP."""
    add_qkv_bias: bool = False
    """A bias in the query/key/value projection even with --disable-bias-linear."""
    qk_layernorm: bool = False
    """Norm of the attention's queries and keys (not the memory's: see --memory-qk-norm)."""
    untie_embeddings_and_output_weights: bool = False
    """An output layer of its own instead of the transposed embedding."""
    attention_dropout: float = option(0.1, at_least=0, below=1)
    """Dropout of attention probabilities."""
    hidden_dropout: float = option(0.1, at_least=0, below=1)
    """Dropout after the embedding and after each block."""
    init_method_std: float = option(0.02, above=0)
    """Standard deviation of the normal distribution that initialises the decoder's weights."""
    transformer_impl: Literal["local", "transformer_engine"] | None = option(
        None,
        not_here={"inference_optimized": "it is for serving only; use transformer_engine"},
    )
    """Layers from megatron-core alone (local) or from Transformer Engine. Without this flag:
    Transformer Engine where it is installed and a GPU is used, else local."""

    num_experts: int | None = option(None, at_least=1, at_most=4096)
    """Number of experts of a mixture-of-experts baseline; none: dense MLPs."""
    moe_layer_freq: int = option(1, at_least=1)
    """Every n-th layer, counted from 0, has experts."""
    moe_ffn_hidden_size: int = derived("--ffn-hidden-size", at_least=1)
    """Inner width of one expert."""
    moe_router_topk: int = option(2, at_least=1)
    """Experts that each token visits."""
    moe_router_load_balancing_type: Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn", "none"
    ] = "aux_loss"
    """How the router spreads tokens over experts."""
    moe_aux_loss_coeff: float = option(0.0, at_least=0)
    """Weight of the load-balancing loss."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall"] = option(
        "allgather",
        not_here={"flex": "it needs the DeepEP or HybridEP kernels; use alltoall"},
    )
    """How tokens travel to their experts."""
    moe_grouped_gemm: bool = False
    """All experts of a rank in one grouped matrix product (needs Transformer Engine)."""

    def __post_init__(self) -> None:
        fill_derived(
            self,
            ffn_hidden_size=_ffn_hidden_size(self.hidden_size, self.swiglu),
            num_query_groups=1 if self.group_query_attention else self.num_attention_heads,
            kv_channels=self.hidden_size // self.num_attention_heads,
            max_position_embeddings=self.seq_length,
        )
        fill_derived(self, moe_ffn_hidden_size=self.ffn_hidden_size)


def _ffn_hidden_size(hidden_size: int, swiglu: bool) -> int:
    if not swiglu:
        return 4 * hidden_size
    # A gated MLP has three matrices instead of two: two thirds of the width, the same size.
    return int(4 * hidden_size * 2 / 3 / 64) * 64
