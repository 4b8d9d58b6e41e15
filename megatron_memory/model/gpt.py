"""GPT with memory layers."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_memory.config import Config
from megatron_memory.config.pipeline import Stage, num_chunks
from megatron_memory.config.pools import Pool, memory_pools, pool_ranks
from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.memory.mlp import memory_of
from megatron_memory.memory.tables import LocalPool, MemoryTables
from megatron_memory.model.config import build_transformer_config
from megatron_memory.model.specs import memory_block_spec
from megatron_memory.runtime import Backend
from megatron_memory.runtime.distributed import pipeline_subgroup


class MemoryGPTModel(GPTModel):
    """Megatron-Core's GPT, or one pipeline stage of it, which owns value tables.

    Without memory layers it is Megatron's GPT and nothing else.

    Args:
        config: see `MemoryTransformerConfig`.
        groups: process groups.
        vp_stage: which of the rank's chunks; None without interleaving.
        kwargs: as `GPTModel`'s.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        *,
        groups: ProcessGroupCollection,
        vp_stage: int | None = None,
        **kwargs,
    ):
        spec = memory_block_spec(config, MemoryGroup.of(groups), vp_stage)
        super().__init__(config, spec, pg_collection=groups, vp_stage=vp_stage, **kwargs)
        self.memory: MemoryTables | None = None
        """The tables that this chunk is the first of its rank's to read."""
        if config.memory_recompute:
            self._leave_recompute_to_memory_layers()

    def _leave_recompute_to_memory_layers(self) -> None:
        """Megatron's recompute of MLPs is for the other layers then: it would route twice."""
        for layer in self.decoder.layers:
            if memory_of(layer.mlp) is not None:
                layer.recompute_mlp = False

    def memory_layers(self) -> list[MemoryLayer]:
        """The memory layers of this chunk, in the model's order."""
        found = (memory_of(layer.mlp) for layer in self.decoder.layers)
        return [memory for memory in found if memory is not None]


def build_model(config: Config, backend: Backend, padded_vocab_size: int) -> list[MemoryGPTModel]:
    """The model's chunks on this pipeline rank, in order: one without interleaving.

    A collective call.

    Args:
        config: the whole configuration.
        backend: where it runs.
        padded_vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    transformer = build_transformer_config(config, backend)
    interleaved = num_chunks(config.stages) > 1
    chunks = [
        MemoryGPTModel(
            transformer,
            groups=groups,
            vp_stage=stage.chunk if interleaved else None,
            **_gpt_options(config, stage, padded_vocab_size),
        )
        for stage in config.stages
        if stage.rank == groups.pp.rank()
    ]
    _give_tables(chunks, config, MemoryGroup.of(groups))
    return [chunk.to(torch.device(backend.device)) for chunk in chunks]


def _gpt_options(config: Config, stage: Stage, padded_vocab_size: int) -> dict:
    model = config.model
    return dict(
        vocab_size=padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        pre_process=stage.has_embedding,
        post_process=stage.has_loss,
    )


def _give_tables(chunks: list[MemoryGPTModel], config: Config, group: MemoryGroup) -> None:
    """Make this rank's tables, held by the first chunk that reads them, and bind the layers."""
    local_pools = {pool: _local_pool(pool, chunks, config) for pool in memory_pools(config)}
    bound: dict[str, torch.nn.Module] = {}
    for chunk in chunks:
        layers = {layer.layer_number - 1: layer for layer in chunk.memory_layers()}
        new = [
            local
            for pool, local in local_pools.items()
            if pool.name not in bound and layers.keys() & set(pool.layers)
        ]
        if new:
            chunk.memory = MemoryTables(layers[min(layers)].config, new, group)
            bound |= dict(chunk.memory.named_children())
        for pool in local_pools:
            for number in layers.keys() & set(pool.layers):
                layers[number].bind(bound[pool.name])


def _local_pool(pool: Pool, chunks: list[MemoryGPTModel], config: Config) -> LocalPool:
    here = {layer.layer_number - 1 for chunk in chunks for layer in chunk.memory_layers()}
    ranks, minutes = pool_ranks(config, pool), config.parallel.distributed_timeout_minutes
    return LocalPool(
        pool=pool,
        num_readers=len(here & set(pool.layers)),
        replicas=pipeline_subgroup(ranks, minutes) if len(ranks) > 1 else None,
    )
