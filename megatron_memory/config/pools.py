"""Which memory layers share a table, and which pipeline ranks hold it."""

import dataclasses
import functools
from dataclasses import dataclass

from megatron_memory.config.pipeline import rank_of_layers
from megatron_memory.config.placement import parse_layers, resolve_memory_layers
from megatron_memory.config.schema import Config
from megatron_memory.exceptions import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class Pool:
    """A table of values (PEER: two) and the layers that read it."""

    name: str
    """Of the module that holds it, and so in checkpoints."""
    number: int
    """Tells the model's tables apart, for their initial values."""
    layers: tuple[int, ...]
    """Memory layers, counted from 0, ascending."""


def memory_layers(config: Config) -> tuple[int, ...]:
    """The memory layers, counted from 0; none without memory.

    Raises:
        ConfigurationError: `--memory-layers` is malformed.
    """
    if config.memory.layers is None:
        return ()
    return resolve_memory_layers(config.memory.layers, config.model.num_layers)


def mlp_layers(config: Config) -> tuple[int, ...]:
    """The layers with an MLP, or with experts in its place, counted from 0.

    Raises:
        ConfigurationError: `--memory-layers` is malformed.
    """
    replaced = () if config.memory.beside_mlp else memory_layers(config)
    return _others(replaced, config.model.num_layers)


@functools.lru_cache(maxsize=16)
def _others(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Remembered: planning asks for each layer of each of a hundred plans."""
    among = set(layers)
    return tuple(layer for layer in range(num_layers) if layer not in among)


@functools.lru_cache(maxsize=64)
def memory_pools(config: Config) -> tuple[Pool, ...]:
    """The model's tables, by `--memory-share-scope`.

    Raises:
        ConfigurationError: `--memory-share-groups` does not fit, or the stages or layers do not.
    """
    layers = memory_layers(config)
    if not layers:
        return ()
    if config.memory.share_scope == "layer":
        return tuple(_pool((layer,), f"layer_{layer}") for layer in layers)
    groups = [layers] if config.memory.share_scope == "model" else _stage_groups(config, layers)
    if groups == [layers]:
        return (Pool(name="shared", number=0, layers=layers),)
    return tuple(_pool(group, _name(group)) for group in groups)


def pool_ranks(config: Config, pool: Pool) -> tuple[int, ...]:
    """The pipeline ranks whose layers read a pool, ascending; each holds a copy."""
    rank_of = rank_of_layers(config.stages)
    return tuple(sorted({rank_of[layer] for layer in pool.layers}))


def groups_text(pools: tuple[Pool, ...]) -> str:
    """`--memory-share-groups` for these pools."""
    return ";".join(",".join(map(str, pool.layers)) for pool in pools)


def _pool(layers: tuple[int, ...], name: str) -> Pool:
    return Pool(name=name, number=1 + layers[0], layers=layers)


def _name(layers: tuple[int, ...]) -> str:
    word = "layer" if len(layers) == 1 else "layers"
    return "_".join([word, *map(str, layers)])


def _stage_groups(config: Config, layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    if config.memory.share_groups is not None:
        return _given_groups(config.memory.share_groups, layers)
    rank_of = rank_of_layers(config.stages)
    by_rank: dict[int, list[int]] = {}
    for layer in layers:
        by_rank.setdefault(rank_of[layer], []).append(layer)
    return [tuple(group) for group in by_rank.values()]


def _given_groups(text: str, layers: tuple[int, ...]) -> list[tuple[int, ...]]:
    flag = f"--memory-share-groups {text}"
    groups = [tuple(sorted(parse_layers(flag, part))) for part in text.split(";")]
    if sorted(layer for group in groups for layer in group) != list(layers):
        raise ConfigurationError(
            f"{flag} does not name each of the memory layers {','.join(map(str, layers))} once: "
            'give for example "'
            + ";".join(map(str, layers))
            + '", a semicolon between tables and a comma between layers of one.'
        )
    return sorted(groups)


def with_share_groups(config: Config) -> Config:
    """`config` with the groups of `--memory-share-scope stage` written down, so that a checkpoint
    means the same tables at any layout."""
    if not config.memory.enabled or config.memory.share_scope != "stage":
        return config
    groups = groups_text(memory_pools(config))
    return dataclasses.replace(
        config, memory=dataclasses.replace(config.memory, share_groups=groups)
    )
