"""Number formats of weights, gradients and attention."""

from dataclasses import dataclass

from megatron_memory.config.option import option


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """fp32 throughout, or bf16 with fp32 main weights."""

    bf16: bool = False
    """Compute in bfloat16; the optimizer keeps fp32 main weights."""
    accumulate_allreduce_grads_in_fp32: bool = option(True, switches={"grad_reduce_in_bf16": False})
    """Accumulate and reduce gradients in fp32."""
    attention_softmax_in_fp32: bool = option(
        True, switches={"disable_attention_softmax_in_fp32": False}
    )
    """Attention's softmax in fp32 when computing in bf16 (local layers)."""
