"""Whether a run's parameters fit, before they are made."""

import dataclasses
from collections.abc import Iterator

from megatron_memory.config import Config, check_config
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.planning.memory import RankMemory, rank_memories

_MOST_TENSOR_RANKS = 8
"""That are looked at: more of them leave the node."""


def check_parameters_fit(
    config: Config, world_size: int, padded_vocab_size: int, available: int
) -> None:
    """Raise a `ConfigurationError` where weights, gradients and optimizer states alone need more
    than is there, which names the smallest `--memory-parallel-size` that would do, or what else.

    Args:
        config: checked for `world_size` ranks.
        world_size: ranks of the run.
        padded_vocab_size: rows of the embedding.
        available: bytes for one rank.
    """
    needed = _needed(config, world_size, padded_vocab_size)
    if needed.bytes <= available:
        return
    where = f" on pipeline rank {needed.rank}" if len(config.stages) > 1 else ""
    ways: dict[str, str] = {}
    for flags, changed in _ways_out(config):
        kind = flags.split()[0]
        size = None if kind in ways else _size_if_legal(changed, world_size, padded_vocab_size)
        if size is not None and size <= available:
            ways[kind] = f"{flags} ({_gib(size)})"
    mend = "take more ranks, or a smaller --memory-num-half-keys or model"
    if ways:
        mend = "give " + ", or ".join(ways.values())
    raise ConfigurationError(
        f"Weights, gradients and optimizer states need {_gib(needed.bytes)}{where} on each rank, "
        f"{_gib(needed.values)} of it for the memory's values (--memory-num-half-keys "
        f"{config.memory.num_half_keys}, --tensor-model-parallel-size "
        f"{config.parallel.tensor_model_parallel_size}, --memory-parallel-size "
        f"{config.memory.parallel_size}), and {_gib(available)} are free, before any activation: "
        f"{mend}."
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Needed:
    rank: int
    """Pipeline rank."""
    bytes: int
    values: int
    """Of them, for tables."""


def _needed(config: Config, world_size: int, padded_vocab_size: int) -> _Needed:
    """Of the rank that needs the most."""
    ranks = rank_memories(config, world_size, padded_vocab_size)
    fullest = max(ranks, key=_parameter_bytes)
    values = fullest.values.total + fullest.shadow
    return _Needed(rank=fullest.rank, bytes=_parameter_bytes(fullest), values=values)


def _parameter_bytes(rank: RankMemory) -> int:
    return rank.states.total + rank.shadow


def _size_if_legal(config: Config, world_size: int, padded_vocab_size: int) -> int | None:
    try:
        check_config(config, world_size)
    except ConfigurationError:
        return None
    return _needed(config, world_size, padded_vocab_size).bytes


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
