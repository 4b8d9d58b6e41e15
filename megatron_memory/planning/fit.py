"""Whether a run's parameters fit, before they are made."""

import dataclasses
from collections.abc import Iterator, Sequence

from megatron_memory.config import Config, check_config
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.planning.memory import rank_memories

_MOST_TENSOR_RANKS = 8
"""That are looked at: more of them leave the node."""


def check_parameters_fit(
    config: Config, world_size: int, padded_vocab_size: int, available: Sequence[int]
) -> None:
    """Raise a `ConfigurationError` where weights, gradients and optimizer states alone need more
    than is there, which names the smallest `--memory-parallel-size` that would do, or what else.

    Args:
        config: checked for `world_size` ranks.
        world_size: ranks of the run.
        padded_vocab_size: rows of the embedding.
        available: bytes for one rank, by pipeline rank.
    """
    needed = max(
        _needed(config, world_size, padded_vocab_size),
        key=lambda stage: stage.bytes - available[stage.rank],
    )
    if needed.bytes <= available[needed.rank]:
        return
    where = f" on pipeline rank {needed.rank}" if len(config.stages) > 1 else ""
    ways: dict[str, str] = {}
    for flags, changed in _ways_out(config):
        kind = flags.split()[0]
        stages = [] if kind in ways else _needed_if_legal(changed, world_size, padded_vocab_size)
        if stages and all(stage.bytes <= available[stage.rank] for stage in stages):
            ways[kind] = f"{flags} ({_gib(max(stage.bytes for stage in stages))})"
    fix = "take more ranks, or a smaller --memory-num-half-keys or model"
    if ways:
        fix = "give " + ", or ".join(ways.values())
    raise ConfigurationError(
        f"Weights, gradients and optimizer states need {_gib(needed.bytes)}{where} on each rank, "
        f"{_gib(needed.values)} of it for the memory's values (--memory-num-half-keys "
        f"{config.memory.num_half_keys}, --tensor-model-parallel-size "
        f"{config.parallel.tensor_model_parallel_size}, --memory-parallel-size "
        f"{config.memory.parallel_size}), and {_gib(available[needed.rank])} are free, "
        f"before any activation: {fix}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Needed:
    """By each rank of a pipeline rank."""

    rank: int
    """Pipeline rank."""
    bytes: int
    values: int
    """Of them, for tables."""


def _needed(config: Config, world_size: int, padded_vocab_size: int) -> list[_Needed]:
    """Of every pipeline rank."""
    return [
        _Needed(
            rank=memory.rank,
            bytes=memory.states.total + memory.shadow,
            values=memory.values.total + memory.shadow,
        )
        for memory in rank_memories(config, world_size, padded_vocab_size)
    ]


def _needed_if_legal(config: Config, world_size: int, padded_vocab_size: int) -> list[_Needed]:
    try:
        check_config(config, world_size)
    except ConfigurationError:
        return []
    return _needed(config, world_size, padded_vocab_size)


def _ways_out(config: Config) -> Iterator[tuple[str, Config]]:
    """Flags and the configuration with them, the least change of each kind first."""
    parallel, memory = config.parallel, config.memory
    if not parallel.use_distributed_optimizer and config.optimizer.optimizer == "adam":
        changed = dataclasses.replace(parallel, use_distributed_optimizer=True)
        yield "--use-distributed-optimizer", dataclasses.replace(config, parallel=changed)
        parallel = changed
    added = "" if parallel == config.parallel else " --use-distributed-optimizer"
    if memory.enabled:
        for size in range(memory.parallel_size + 1, memory.value_dim + 1):
            if memory.value_dim % size == 0:
                yield (
                    f"--memory-parallel-size {size}{added}",
                    dataclasses.replace(
                        config,
                        parallel=parallel,
                        memory=dataclasses.replace(memory, parallel_size=size),
                    ),
                )
    ranks = 2 * parallel.tensor_model_parallel_size
    while ranks <= _MOST_TENSOR_RANKS:
        changed = dataclasses.replace(parallel, tensor_model_parallel_size=ranks)
        yield (
            f"--tensor-model-parallel-size {ranks}{added}",
            dataclasses.replace(config, parallel=changed),
        )
        ranks *= 2


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"
