"""Megatron's transformer configuration for ours."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F

from megatron_memory.config import Config, ModelConfig
from megatron_memory.config.pipeline import Stage, num_chunks
from megatron_memory.config.pools import memory_layers
from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.optional import is_installed
from megatron_memory.runtime import Backend


def use_transformer_engine(model: ModelConfig, backend: Backend) -> bool:
    """Transformer Engine's layers: as asked, else where it is installed and there is a GPU."""
    if model.transformer_impl is not None:
        return model.transformer_impl == "transformer_engine"
    return backend.is_cuda and is_installed("te")


def build_transformer_config(config: Config, backend: Backend) -> MemoryTransformerConfig:
    """Megatron's configuration for ours."""
    model, memory = config.model, config.memory
    dtype = torch.bfloat16 if config.precision.bf16 else torch.float32
    return MemoryTransformerConfig(
        memory=memory,
        memory_layers=memory_layers(config),
        memory_seed=config.training.seed,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=F.silu if model.swiglu else F.gelu,
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        rotary_interleaved=model.rotary_interleaved,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_method_std,
        bf16=config.precision.bf16,
        calculate_per_token_loss=config.training.calculate_per_token_loss,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=config.precision.attention_softmax_in_fp32,
        use_cpu_initialization=not backend.is_cuda,
        transformer_impl="transformer_engine"
        if use_transformer_engine(model, backend)
        else "local",
        **_parallel_options(config, backend.is_cuda),
        **_recompute_options(config),
        **_moe_options(model),
        **_fusion_options(model, backend),
    )


def _parallel_options(config: Config, is_cuda: bool) -> dict:
    parallel = config.parallel
    return dict(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        **_pipeline_options(config, is_cuda),
    )


def _pipeline_options(config: Config, is_cuda: bool) -> dict:
    parallel, stages = config.parallel, config.stages
    if len(stages) == 1:
        return {}
    options: dict = dict(
        pipeline_model_parallel_layout=[_layout_row(stage) for stage in stages],
        # Gloo still reads an output that megatron-core would have freed while it is sent.
        deallocate_pipeline_outputs=is_cuda,
    )
    if num_chunks(stages) > 1:
        overlap = parallel.overlap_p2p_communication
        options |= dict(
            microbatch_group_size_per_vp_stage=(
                parallel.microbatch_group_size_per_virtual_pipeline_stage
                or parallel.pipeline_model_parallel_size
            ),
            overlap_p2p_comm=overlap,
            batch_p2p_comm=not overlap,
        )
    return options


def _layout_row(stage: Stage) -> list[str]:
    row = ["decoder"] * len(stage.layers)
    return ["embedding"] * stage.has_embedding + row + ["loss"] * stage.has_loss


def _recompute_options(config: Config) -> dict:
    recompute = config.recompute
    options: dict = dict(
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
    )
    if recompute.recompute_modules is not None:
        # Megatron knows its own modules only.
        options["recompute_modules"] = [m for m in recompute.recompute_modules if m != "memory"]
        options["memory_recompute"] = "memory" in recompute.recompute_modules
    return options


def _moe_options(model: ModelConfig) -> dict:
    if model.num_experts is None:
        return {}
    return dict(
        num_moe_experts=model.num_experts,
        moe_layer_freq=model.moe_layer_freq,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_router_topk=model.moe_router_topk,
        moe_router_load_balancing_type=model.moe_router_load_balancing_type,
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_token_dispatcher_type=model.moe_token_dispatcher_type,
        moe_grouped_gemm=model.moe_grouped_gemm,
    )


def _fusion_options(model: ModelConfig, backend: Backend) -> dict:
    """Megatron's fused kernels, each where what it is written in is there."""
    transformer_engine = use_transformer_engine(model, backend)
    return dict(
        bias_dropout_fusion=backend.is_cuda,
        # Megatron's fused GELU is the tanh approximation, which only GPUs would then compute.
        bias_activation_fusion=backend.is_cuda and model.swiglu and not model.num_experts,
        masked_softmax_fusion=transformer_engine,
        apply_rope_fusion=transformer_engine and not model.rotary_interleaved,
        gradient_accumulation_fusion=backend.is_cuda and _apex_adds_gradients_in_place(),
        persist_layer_norm=False,
    )


def _apex_adds_gradients_in_place() -> bool:
    """Whether Apex was built with the kernel behind `gradient_accumulation_fusion`."""
    return find_spec("fused_weight_gradient_mlp_cuda") is not None
