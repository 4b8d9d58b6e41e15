"""Megatron's transformer configuration, with the memory."""

import dataclasses
from dataclasses import dataclass

from megatron.core.transformer import TransformerConfig

from megatron_memory.config import MemoryConfig


@dataclass
class MemoryTransformerConfig(TransformerConfig):
    """`TransformerConfig` and what memory layers add to it."""

    memory: MemoryConfig = dataclasses.field(default_factory=MemoryConfig)
    """The memory layers; disabled: a model without memory."""
    memory_layers: tuple[int, ...] = ()
    """Layers with a memory in place of the MLP or beside it, counted from 0 in the whole model."""
    memory_seed: int = 1234
    """Seed of the value tables' initial values."""
    memory_recompute: bool = False
    """Whether backward computes the memory layers' sums and gates again; see `MemoryLayer`."""

    def __post_init__(self):
        # Layers differ, so each needs a checkpoint key of its own; the field is spelled so in
        # Megatron.
        self.hetereogenous_dist_checkpoint = True
        super().__post_init__()

    @property
    def memory_num_slots(self) -> int:
        """S: rows of a value table."""
        return self.memory.num_values

    @property
    def memory_value_dim(self) -> int:
        """D: columns of a value table."""
        return self.memory.value_dim

    @property
    def memory_key_dim(self) -> int:
        """Length of a key, both halves together."""
        return self.memory.key_dim

    @property
    def memory_projects_output(self) -> bool:
        """Whether `linear_fc2` follows the lookup."""
        if self.memory.variant == "pkm":
            return self.memory_value_dim != self.hidden_size
        return self.memory.variant == "memory+"
