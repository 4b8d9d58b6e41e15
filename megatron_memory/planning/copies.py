"""What copies of a table on several pipeline ranks cost."""

from collections.abc import Iterator

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_pools, pool_ranks
from megatron_memory.planning.groups import groups, sent_bytes
from megatron_memory.planning.parameters import size_on_rank, table_weights
from megatron_memory.planning.report import bytes_text
from megatron_memory.planning.states import gradient_element, state_bytes


def copies_notes(config: Config, world_size: int) -> Iterator[str]:
    """A line for each table that `--memory-replicate-pool` has copied; none without copies."""
    for pool in memory_pools(config):
        ranks = pool_ranks(config, pool)
        if len(ranks) == 1:
            continue
        tables = table_weights(config, [pool], [ranks])
        held = state_bytes(config, tables, world_size).total
        gradient = sum(size_on_rank(config, table) for table in tables) * gradient_element(config)
        if config.parallel.use_distributed_optimizer:
            gradient //= groups(config, world_size)["copies"].size
        sent = sent_bytes("all-reduce", gradient, len(ranks))
        yield (
            f"--memory-replicate-pool: the table of layers {_listed(pool.layers)} is on pipeline "
            f"ranks {_listed(ranks)}; each of their ranks holds {bytes_text(held)} of it, with "
            f"gradients and optimizer states, and sends {bytes_text(sent)} in every step to sum "
            "the copies' gradients"
        )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
