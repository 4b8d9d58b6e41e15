"""The decoder's layers: Megatron-Core's own specs, with a memory layer for the MLP of the chosen
ones, or beside it."""

from dataclasses import replace

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.layer import MemoryLayer, MemoryLayerSubmodules
from megatron_memory.memory.mlp import MLPWithMemory, MLPWithMemorySubmodules
from megatron_memory.model.norms import norm_class
from megatron_memory.optional import require


def memory_block_spec(
    config: MemoryTransformerConfig, group: MemoryGroup, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the block's final norm."""
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        vp_stage=vp_stage,
    )
    offset = get_transformer_layer_offset(config, vp_stage)
    layers = [
        _with_memory(spec, config, group) if offset + i in config.memory_layers else spec
        for i, spec in enumerate(block.layer_specs)
    ]
    if config.transformer_impl == "local":
        layers = [_with_local_norms(spec, config) for spec in layers]
        return replace(block, layer_specs=layers, layer_norm=norm_class(config))
    return replace(block, layer_specs=layers)


def _with_memory(
    spec: ModuleSpec, config: MemoryTransformerConfig, group: MemoryGroup
) -> ModuleSpec:
    """The layer with a memory for its MLP, or beside it, and a norm before it that is not fused
    into fc1."""
    local = config.transformer_impl == "local"
    backend = LocalSpecProvider() if local else _transformer_engine_provider()
    linear = dict(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    memory = MemoryLayerSubmodules(**linear)
    params = {"group": group}
    mlp = ModuleSpec(module=MemoryLayer, params=params, submodules=memory)
    if config.memory.beside_mlp:
        both = MLPWithMemorySubmodules(**linear, memory=memory)
        mlp = ModuleSpec(module=MLPWithMemory, params=params, submodules=both)
    return replace(
        spec,
        submodules=replace(
            spec.submodules,
            pre_mlp_layernorm=norm_class(config) if local else backend.layer_norm(),
            mlp=mlp,
            # Checkpoint names as Transformer Engine's layers have them: the first norm is fused
            # into its projection there, but the norm before a memory layer stands alone.
            sharded_state_dict_keys_map=(
                {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"} if local else {}
            ),
        ),
    )


def _with_local_norms(spec: ModuleSpec, config: MemoryTransformerConfig) -> ModuleSpec:
    """megatron-core's local norms refuse sequence parallelism; ours know it."""
    norm = norm_class(config)
    attention = spec.submodules.self_attention
    if config.qk_layernorm:
        attention = replace(
            attention,
            submodules=replace(attention.submodules, q_layernorm=norm, k_layernorm=norm),
        )
    pre_mlp = spec.submodules.pre_mlp_layernorm
    return replace(
        spec,
        submodules=replace(
            spec.submodules,
            input_layernorm=norm,
            self_attention=attention,
            pre_mlp_layernorm=IdentityOp if pre_mlp is IdentityOp else norm,
        ),
    )


def _transformer_engine_provider():
    """Megatron's provider of Transformer Engine's layers, which imports where that is installed."""
    require("te")
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()
