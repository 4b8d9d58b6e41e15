"""All value tables of a model chunk."""

import dataclasses

from megatron.core.transformer import MegatronModule
from torch.distributed import ProcessGroup

from megatron_memory.config.pools import Pool
from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.table import ValueTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalPool:
    """A pool as this pipeline rank has it."""

    pool: Pool
    num_readers: int
    """Layers of this rank that read it."""
    replicas: ProcessGroup | None
    """The pipeline ranks with a copy; None where it is on this one alone."""


class MemoryTables(MegatronModule):
    """Value tables, held at a model's root: saved once, counted once, reduced once.

    Of a rank's chunks, the first that reads a pool holds it.

    Args:
        config: the model's.
        pools: that this chunk holds.
        group: the ranks that share the columns.
    """

    def __init__(self, config: MemoryTransformerConfig, pools: list[LocalPool], group: MemoryGroup):
        super().__init__(config)
        for local in pools:
            self.add_module(local.pool.name, PoolTables(config, local, group))

    def tables(self) -> list[ValueTable]:
        """Every table held here."""
        return [module for module in self.modules() if isinstance(module, ValueTable)]


class PoolTables(MegatronModule):
    """The tables of one pool, by name: `values`, or PEER's `values_u` and `values_v`."""

    def __init__(self, config: MemoryTransformerConfig, local: LocalPool, group: MemoryGroup):
        super().__init__(config)
        names = ("values_u", "values_v") if config.memory.variant == "peer" else ("values",)
        for i, name in enumerate(names):
            table = ValueTable(
                config,
                num_readers=local.num_readers,
                table_number=2 * local.pool.number + i,
                group=group,
                replicas=local.replicas,
                seed=config.memory_seed,
            )
            self.add_module(name, table)
