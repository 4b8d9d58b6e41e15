"""The parameters of the model's chunks on pipeline ranks; what is asked for often is remembered."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from megatron_memory.config import Config
from megatron_memory.config.pipeline import Stage
from megatron_memory.config.pools import Pool, memory_pools, pool_ranks
from megatron_memory.planning.parameters import (
    Weight,
    embedding_weights,
    layer_weights,
    output_weights,
    table_weights,
)


@lru_cache(maxsize=64)
def by_rank(config: Config) -> Mapping[int, Sequence[Stage]]:
    """The stages of each pipeline rank."""
    ranks: dict[int, list[Stage]] = {}
    for stage in config.stages:
        ranks.setdefault(stage.rank, []).append(stage)
    return dict(sorted(ranks.items()))


def pools_of(config: Config, stage: Stage) -> list[Pool]:
    """The pools that a stage holds: the first of its rank's stages that reads one holds it."""
    earlier = {
        layer
        for other in by_rank(config)[stage.rank]
        if other.chunk < stage.chunk
        for layer in other.layers
    }
    return [
        pool
        for pool in memory_pools(config)
        if set(pool.layers) & set(stage.layers) and not set(pool.layers) & earlier
    ]


def rank_pools(config: Config, rank: int) -> Sequence[Pool]:
    """The pools of which a pipeline rank has a copy."""
    return _pools_by_rank(config).get(rank, [])


@lru_cache(maxsize=64)
def _pools_by_rank(config: Config) -> Mapping[int, Sequence[Pool]]:
    ranks: dict[int, list[Pool]] = {}
    for pool in memory_pools(config):
        for rank in pool_ranks(config, pool):
            ranks.setdefault(rank, []).append(pool)
    return ranks


@lru_cache(maxsize=256)
def stage_weights(config: Config, stage: Stage, padded_vocab_size: int) -> Sequence[Weight]:
    """The parameters of one stage."""
    found = layer_weights(config, stage.layers)
    ends: tuple[int, ...] = ()
    num_ranks = config.parallel.pipeline_model_parallel_size
    if num_ranks > 1 and not config.model.untie_embeddings_and_output_weights:
        ends = (0, num_ranks - 1)
    if stage.has_embedding:
        found = [*embedding_weights(config, padded_vocab_size, ends), *found]
    if stage.has_loss:
        found += output_weights(config, padded_vocab_size, ends)
    pools = pools_of(config, stage)
    ranks = [pool_ranks(config, pool) for pool in pools]
    return found + table_weights(config, pools, [r if len(r) > 1 else () for r in ranks])
