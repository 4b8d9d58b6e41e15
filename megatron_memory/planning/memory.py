"""Bytes on every pipeline rank, while it trains."""

import dataclasses
from collections.abc import Sequence

from megatron_memory.config import Config
from megatron_memory.config.pipeline import Stage
from megatron_memory.config.pools import memory_layers
from megatron_memory.planning.activations import (
    Kept,
    Sizes,
    add,
    chunk_activations,
    embedding_activations,
    layers_of,
    output_activations,
    passed_activations,
    probability_bytes,
    recomputed_at_once,
)
from megatron_memory.planning.schedule import most_held
from megatron_memory.planning.stages import by_rank, stage_weights
from megatron_memory.planning.states import StateBytes, counter_bytes, shadow_bytes, state_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on each rank of one pipeline stage."""

    rank: int
    """Pipeline rank."""
    values: StateBytes
    """Of the memory's tables."""
    rest: StateBytes
    """Of all other parameters."""
    shadow: int
    """The values in fp8."""
    counters: int
    """How much each slot was read."""
    activations: Kept
    """Kept for backward passes, of all microbatches at once."""
    held: tuple[int, ...]
    """How many microbatches that is, by chunk."""
    working: int
    """Temporaries of the backward pass, at its fullest moment, and what recompute makes anew."""
    gathered: int
    """Megatron's buffer for sequences that are gathered before a matrix product."""
    passed: int
    """Activations and gradients on their way from and to pipeline neighbours."""

    @property
    def states(self) -> StateBytes:
        """Of all parameters."""
        return self.values + self.rest

    @property
    def total(self) -> int:
        """At the fullest moment of a step: in a backward pass, or in the update."""
        passing = sum(self.activations.values()) + self.working
        steady = self.states.total + self.shadow + self.counters + self.gathered
        return steady + max(passing + self.passed, self.states.update)


def rank_memories(config: Config, world_size: int, padded_vocab_size: int) -> list[RankMemory]:
    """One for each pipeline rank, in order. `config` is checked for so many ranks."""
    return [
        _rank_memory(config, stages, world_size, padded_vocab_size)
        for stages in by_rank(config).values()
    ]


def fullest(memories: list[RankMemory]) -> RankMemory:
    """The pipeline rank that needs the most."""
    return max(memories, key=lambda memory: memory.total)


def _rank_memory(
    config: Config, stages: Sequence[Stage], world_size: int, padded_vocab_size: int
) -> RankMemory:
    sizes, parallel = Sizes(config=config, layers=layers_of(config)), config.parallel
    values = rest = StateBytes(weights=0, gradients=0, main_weights=0, optimizer_states=0)
    shadow, kept = 0, []
    for stage in stages:
        found = stage_weights(config, stage, padded_vocab_size)
        values += state_bytes(config, [w for w in found if w.part == "values"], world_size)
        rest += state_bytes(config, [w for w in found if w.part != "values"], world_size)
        shadow += shadow_bytes(config, found)
        kept.append(_stage_kept(sizes, stage, padded_vocab_size))
    _, held = most_held(
        [sum(of_chunk.values()) for of_chunk in kept],
        rank=stages[0].rank,
        num_ranks=parallel.pipeline_model_parallel_size,
        num_microbatches=config.num_microbatches(world_size),
    )
    activations: Kept = {}
    for of_chunk, number in zip(kept, held, strict=True):
        add(activations, {part: size * number for part, size in of_chunk.items()})
    return RankMemory(
        rank=stages[0].rank,
        values=values,
        rest=rest,
        shadow=shadow,
        counters=counter_bytes(config, _num_memory_layers(config, stages), world_size),
        activations=activations,
        held=held,
        working=max(_working(sizes, stage, padded_vocab_size) for stage in stages),
        gathered=_gathered(sizes),
        passed=4 * sizes.stream if parallel.pipeline_model_parallel_size > 1 else 0,
    )


def _num_memory_layers(config: Config, stages: Sequence[Stage]) -> int:
    here = {layer for stage in stages for layer in stage.layers}
    return len(here & set(memory_layers(config)))


def _stage_kept(sizes: Sizes, stage: Stage, padded_vocab_size: int) -> Kept:
    kept = chunk_activations(sizes, stage.layers)
    if stage.has_embedding:
        add(kept, {"stream": embedding_activations(sizes)})
    if stage.has_loss:
        add(kept, {"stream": output_activations(sizes, padded_vocab_size)})
    passed = passed_activations(sizes, is_first=stage.has_embedding, is_last=stage.has_loss)
    add(kept, {"stream": passed})
    return kept


def _gathered(sizes: Sizes) -> int:
    if not sizes.config.parallel.sequence_parallel:
        return 0
    return sizes.tokens * sizes.config.model.hidden_size * sizes.element


def _working(sizes: Sizes, stage: Stage, padded_vocab_size: int) -> int:
    """Beyond what is kept when the backward pass begins."""
    of_layers = _layer_working(sizes)
    if set(stage.layers) & set(memory_layers(sizes.config)):
        of_layers = max(of_layers, _bag_working(sizes))
    of_layers += recomputed_at_once(sizes, stage.layers)
    if not stage.has_loss:
        return of_layers
    # By then the loss has let go of its probabilities.
    of_layers -= probability_bytes(sizes, padded_vocab_size)
    return max(of_layers, _loss_working(sizes, padded_vocab_size))


def _layer_working(sizes: Sizes) -> int:
    """Gradients of an MLP's inner tensors and of its first matrix."""
    model, e = sizes.config.model, sizes.element
    width = (2 if model.swiglu else 1) * model.ffn_hidden_size // sizes.ranks
    return e * width * (sizes.tokens + model.hidden_size)


def _bag_working(sizes: Sizes) -> int:
    """Reads sorted by row, with their weights' gradients."""
    memory = sizes.config.memory
    rows = memory.num_heads * (memory.top_k + memory.num_random_values)
    reads = sizes.tokens * memory.parallel_size * rows
    columns = memory.value_dim // (sizes.ranks * memory.parallel_size)
    return reads * 32 + 2 * sizes.tokens * memory.parallel_size * columns * sizes.element


def _loss_working(sizes: Sizes, padded_vocab_size: int) -> int:
    """Gradients of the logits, of the output layer's matrix and of its input."""
    hidden, rows = sizes.config.model.hidden_size, padded_vocab_size // sizes.ranks
    e = sizes.element
    logits = sizes.tokens * rows
    product = sizes.tokens * hidden * e
    products = rows * hidden * e + product
    if e == 4:
        return products  # the logits' gradient is written over them
    # The bf16 gradient beside the fp32 one, then beside the products' results.
    return max(logits * e + product, logits * e - logits * 4 + products)
