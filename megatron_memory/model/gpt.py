"""GPT with memory layers."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_memory.config import Config
from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.memory.table import MemoryTables
from megatron_memory.model.config import build_transformer_config
from megatron_memory.model.specs import memory_block_spec
from megatron_memory.runtime import Backend


class MemoryGPTModel(GPTModel):
    """Megatron-Core's GPT, which owns the value tables that its memory layers read.

    Without memory layers it is Megatron's GPT and nothing else.

    Args:
        config: see `MemoryTransformerConfig`.
        pg_collection: process groups; None takes megatron-core's global ones.
        kwargs: as `GPTModel`'s.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        *,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs,
    ):
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        group = MemoryGroup.of(pg_collection)
        spec = memory_block_spec(config, group)
        super().__init__(config, spec, pg_collection=pg_collection, **kwargs)
        self.memory: MemoryTables | None = None
        layers = self.memory_layers()
        if layers:
            numbers = tuple(layer.layer_number - 1 for layer in layers)
            self.memory = MemoryTables(config, numbers, group)
            for layer, number in zip(layers, numbers, strict=True):
                layer.bind(self.memory.of_layer(number))
        if config.memory_recompute:
            self._leave_recompute_to_memory_layers()

    def _leave_recompute_to_memory_layers(self) -> None:
        """Megatron's recompute of MLPs is for the other layers then: it would route twice."""
        for layer in self.decoder.layers:
            if isinstance(layer.mlp, MemoryLayer):
                layer.recompute_mlp = False

    def memory_layers(self) -> list[MemoryLayer]:
        """The memory layers on this rank, in the model's order."""
        mlps = (layer.mlp for layer in self.decoder.layers)
        return [mlp for mlp in mlps if isinstance(mlp, MemoryLayer)]


def build_model(config: Config, backend: Backend, padded_vocab_size: int) -> MemoryGPTModel:
    """The model that the configuration describes, on this rank's device.

    Args:
        config: the whole configuration.
        backend: where it runs.
        padded_vocab_size: rows of the embedding, a multiple of the tensor-parallel size.
    """
    model = MemoryGPTModel(
        build_transformer_config(config, backend),
        vocab_size=padded_vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        position_embedding_type=config.model.position_embedding_type,
        rotary_percent=config.model.rotary_percent,
        rotary_base=config.model.rotary_base,
        share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
    )
    return model.to(torch.device(backend.device))
