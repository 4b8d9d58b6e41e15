"""What a fresh training would begin with: the memory layers' own tensors, and value tables.

The tables are a fresh training's to the bit, for its generators belong to blocks of columns. Of the
other tensors the distributions are, for a training draws them in the order of its whole model.
"""

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_memory.config import Config
from megatron_memory.config.pools import Pool
from megatron_memory.conversion.evaluate import on_one_rank
from megatron_memory.conversion.growth.tensors import memory_prefixes
from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.initialization import FreshColumns
from megatron_memory.memory.layer import MemoryLayer, MemoryLayerSubmodules
from megatron_memory.model.config import build_transformer_config
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import seed_everything


def fresh_layers(config: Config, seed: int) -> Tensors:
    """All tensors of the memory layers but the tables, fp32; needs Megatron's groups."""
    provider = LocalSpecProvider()
    linear = MemoryLayerSubmodules(
        linear_fc1=provider.column_parallel_linear(), linear_fc2=provider.row_parallel_linear()
    )
    transformer = build_transformer_config(on_one_rank(config), select_backend("cpu"))
    group = MemoryGroup.of(ProcessGroupCollection.use_mpu_process_groups())
    seed_everything(seed)
    found: Tensors = {}
    for prefix in memory_prefixes(config):
        layer = MemoryLayer(transformer, linear, group)
        for name, parameter in layer.named_parameters():
            found[prefix + name] = from_memory(parameter.detach())
    return found


def fresh_table(
    config: Config, pool: Pool, number: int, seed: int, first_column: int = 0
) -> LazyTensor:
    """Columns of a value table from `first_column` on, [S, D - first_column], fp32.

    Args:
        config: with the table's sizes.
        pool: that the table is of.
        number: of the table in its pool.
        seed: of the run.
        first_column: the first one wanted.
    """
    memory = config.memory
    columns = FreshColumns(
        std=memory.value_dim**-0.5,
        first_column=first_column,
        last_column=memory.value_dim,
        seed=seed,
        table_number=2 * pool.number + number,
    )
    return LazyTensor(
        shape=(memory.num_values, memory.value_dim - first_column),
        dtype=torch.float32,
        read_rows=columns.read_rows,
    )
