"""Pipelines that put all readers of a table on one rank, so that nothing is copied or sent."""

from collections.abc import Iterator
from functools import cache

from megatron_memory.config.pipeline import layout_text, rank_of_layers, stage_flags
from megatron_memory.config.pools import Pool, memory_layers, memory_pools, pool_ranks
from megatron_memory.config.schema import Config

_MOST_CHUNKS = 8
"""Stages a rank that a proposal has at most: each costs every microbatch another round."""


def pool_problems(config: Config) -> Iterator[str]:
    """A message for each table whose readers are on several pipeline ranks, with what would do."""
    if config.memory.replicate_pool:
        return
    rank_of = rank_of_layers(config.stages)
    for pool in memory_pools(config):
        if len(pool_ranks(config, pool)) > 1:
            where = ", ".join(f"layer {layer} on rank {rank_of[layer]}" for layer in pool.layers)
            ways = "\n".join(f"  * {way}" for way in _ways_out(config, pool))
            yield (
                f"The memory layers {', '.join(map(str, pool.layers))} read one table, and "
                f"--pipeline-model-parallel-size {config.parallel.pipeline_model_parallel_size} "
                f"spreads them over several pipeline ranks: {where}. Layers count from 0. Choose "
                f"one of:\n{ways}"
            )


def _ways_out(config: Config, pool: Pool) -> Iterator[str]:
    yield from _layouts(config, pool)
    ranks = len(pool_ranks(config, pool))
    if config.memory.share_groups is not None:
        # Other layers, and the scope that they have already, would meet the same groups.
        yield (
            f'--memory-share-groups "{_groups_by_rank(config)}": another model, with {ranks} '
            "tables here, one for each of these ranks' layers"
        )
        yield "--memory-replicate-pool" + _copies_cost(ranks)
        return
    layers = nearest_layers_on_one_rank(config, pool)
    if layers is not None:
        yield (
            f"--memory-layers {','.join(map(str, layers))}: another model, with the nearest layers "
            "that are on one rank of the present layout"
        )
    yield (
        f"--memory-share-scope stage: another model, with {ranks} tables, one for each of these "
        "ranks' layers"
    )
    yield (
        f"--memory-share-scope layer: another model, with {len(pool.layers)} tables, one for each "
        "layer"
    )
    yield "--memory-replicate-pool" + _copies_cost(ranks)


def _copies_cost(ranks: int) -> str:
    return (
        f": a copy of the table on each of {ranks} ranks, gradients summed in every step; "
        "--dry-run says what that costs"
    )


def _groups_by_rank(config: Config) -> str:
    """`--memory-share-groups` with each table cut into one for each rank that reads it."""
    rank_of = rank_of_layers(config.stages)
    groups = [
        [layer for layer in pool.layers if rank_of[layer] == rank]
        for pool in memory_pools(config)
        for rank in pool_ranks(config, pool)
    ]
    return ";".join(",".join(map(str, group)) for group in groups)


def _layouts(config: Config, pool: Pool) -> Iterator[str]:
    num_layers = config.model.num_layers
    num_ranks = config.parallel.pipeline_model_parallel_size
    instead = _in_place_of(config)
    for size in equal_stages_for(pool.layers, num_layers, num_ranks):
        rank = pool.layers[0] // size % num_ranks
        yield (
            f"--num-layers-per-virtual-pipeline-stage {size}{instead}: all on rank {rank}, "
            f"{num_layers // size // num_ranks} stages a rank"
        )
        return
    found = uneven_stages_for(pool.layers, num_layers, num_ranks)
    if found is not None:
        yield (
            f'--pipeline-model-parallel-layout "{layout_text(found)}"{instead}: all on one rank, '
            f"{len(found) // num_ranks} stages a rank of {min(found)} to {max(found)} layers"
        )


def _in_place_of(config: Config) -> str:
    """The flags that say the stages' layers now, and must go."""
    given = stage_flags(config.parallel)
    return f" in place of {' and '.join(given)}" if given else ""


def equal_stages_for(layers: tuple[int, ...], num_layers: int, num_ranks: int) -> Iterator[int]:
    """Layers of a stage, the largest first, with which interleaving puts `layers` on one rank."""
    for size in range(num_layers // num_ranks, 0, -1):
        chunks = num_layers // num_ranks // size
        even = chunks * size * num_ranks == num_layers and chunks <= _MOST_CHUNKS
        if even and len({layer // size % num_ranks for layer in layers}) == 1:
            yield size


def uneven_stages_for(layers: tuple[int, ...], num_layers: int, num_ranks: int) -> list[int] | None:
    """Layers of each stage, as few and as even as can be, that put `layers` on one rank.

    Returns:
        None where no layout of at most eight stages a rank does, with stages of sizes that differ
        by three at most.
    """
    for chunks in range(1, _MOST_CHUNKS + 1):
        num_stages = chunks * num_ranks
        low, high = num_layers // num_stages, -(-num_layers // num_stages)
        for spread in (0, 1):
            for rank in range(num_ranks):
                sizes = _fill(
                    frozenset(layers),
                    num_layers,
                    num_ranks,
                    rank=rank,
                    num_stages=num_stages,
                    sizes=range(high + spread, max(1, low - spread) - 1, -1),
                )
                if sizes is not None:
                    return sizes
    return None


def _fill(
    layers: frozenset[int], num_layers: int, num_ranks: int, *, rank: int, num_stages: int, sizes
) -> list[int] | None:
    """Sizes of the stages, in order, such that only those of `rank` hold one of `layers`."""

    @cache
    def rest(stage: int, first: int) -> tuple[int, ...] | None:
        if stage == num_stages:
            return () if first == num_layers else None
        for size in sizes:
            stage_layers = range(first, first + size)
            if stage_layers.stop > num_layers:
                continue
            if stage % num_ranks != rank and any(layer in layers for layer in stage_layers):
                continue
            following = rest(stage + 1, stage_layers.stop)
            if following is not None:
                return (size, *following)
        return None

    found = rest(0, 0)
    return None if found is None else list(found)


def nearest_layers_on_one_rank(config: Config, pool: Pool) -> tuple[int, ...] | None:
    """All memory layers with a pool's moved, by as little as can be, to one rank's layers.

    Returns:
        None where no rank has so many layers free.
    """
    others = set(memory_layers(config)) - set(pool.layers)
    rank_of = rank_of_layers(config.stages)
    best: tuple[int, tuple[int, ...]] | None = None
    for rank in sorted(set(rank_of.values())):
        free = [layer for layer in rank_of if rank_of[layer] == rank and layer not in others]
        moved = _match(pool.layers, free)
        if moved is not None:
            cost = sum(abs(old - new) for old, new in zip(pool.layers, moved, strict=True))
            best = min(best, (cost, moved)) if best else (cost, moved)
    return None if best is None else tuple(sorted({*best[1], *others}))


def _match(wanted: tuple[int, ...], free: list[int]) -> tuple[int, ...] | None:
    """As many of `free` as are wanted, in order, with the smallest sum of distances."""

    @cache
    def match(i: int, j: int) -> tuple[int, tuple[int, ...]] | None:
        if i == len(wanted):
            return 0, ()
        if len(free) - j < len(wanted) - i:
            return None
        found = [match(i, j + 1)]
        taken = match(i + 1, j + 1)
        if taken is not None:
            found.append((taken[0] + abs(wanted[i] - free[j]), (free[j], *taken[1])))
        return min((option for option in found if option is not None), default=None)

    best = match(0, 0)
    return None if best is None else best[1]
