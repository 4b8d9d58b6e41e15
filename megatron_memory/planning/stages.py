"""The model's chunks on pipeline ranks, with the tables that each registers."""

import dataclasses

from megatron_memory.config import Config
from megatron_memory.planning.parameters import (
    Weight,
    embedding_weights,
    layer_weights,
    num_owners,
    output_weights,
    table_weights,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive layers on one pipeline rank; a rank has several where stages are interleaved."""

    rank: int
    """Pipeline rank."""
    number: int
    """Counts the rank's chunks from 0."""
    layers: tuple[int, ...]
    """Counted from 0 over the whole model."""
    has_embedding: bool
    has_loss: bool
    num_pools: int
    """Pools of values that it registers; PEER's have two tables each."""


def model_chunks(config: Config) -> tuple[Chunk, ...]:
    """All chunks in the model's order."""
    return (
        Chunk(
            rank=0,
            number=0,
            layers=tuple(range(config.model.num_layers)),
            has_embedding=True,
            has_loss=True,
            num_pools=num_owners(config),
        ),
    )


def by_rank(chunks: tuple[Chunk, ...]) -> dict[int, list[Chunk]]:
    """The chunks of each pipeline rank."""
    ranks: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        ranks.setdefault(chunk.rank, []).append(chunk)
    return dict(sorted(ranks.items()))


def chunk_weights(config: Config, chunk: Chunk, padded_vocab_size: int) -> list[Weight]:
    """The parameters of one chunk."""
    found = layer_weights(config, chunk.layers)
    if chunk.has_embedding:
        found = [*embedding_weights(config, padded_vocab_size), *found]
    if chunk.has_loss:
        has_embedding = chunk.has_embedding
        found += output_weights(config, padded_vocab_size, has_embedding=has_embedding)
    return found + table_weights(config, chunk.num_pools)
