"""What ranks send each other in a step, exchange by exchange.

Checked against the collectives of real steps (tests/planning/test_communication.py), but for
context parallelism's, which is Transformer Engine's.

Axes: T tokens of a microbatch on a tensor-parallel group, H heads of the memory, K values read per
head, D value dimension; M neighbours.
"""

import collections
import dataclasses
from typing import Literal

from megatron_memory.config import Config
from megatron_memory.planning.activations import Sizes, layers_of
from megatron_memory.planning.groups import Collective, GroupName, groups, sent_bytes
from megatron_memory.planning.parameters import memory_layers, projects_output, size_on_rank
from megatron_memory.planning.stages import Chunk, by_rank, chunk_weights, model_chunks
from megatron_memory.planning.states import buffers, element, gradient_element

Purpose = Literal[
    "activations",
    "loss",
    "attention of other parts of the sequence",
    "memory: slots and weights",
    "memory: looked-up sums",
    "memory: PEER's inputs and products",
    "replicated weights' gradients",
    "gradients",
    "weights",
    "values' gradients",
    "values' weights",
    "between stages",
    "tied embedding's gradients",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Collectives of one kind, of one rank in one step."""

    purpose: Purpose
    group: GroupName
    collective: Collective
    size: int
    """Bytes of the whole tensors, over the step."""
    ranks: int
    """Of the group."""

    @property
    def sent(self) -> int:
        """Bytes that the rank sends, see `sent_bytes`."""
        return sent_bytes(self.collective, self.size, self.ranks)


class _Tally:
    """Sums exchanges of a kind."""

    def __init__(self, config: Config, world_size: int):
        self.groups = groups(config, world_size)
        self._sizes: collections.Counter = collections.Counter()

    def add(self, purpose: Purpose, group: GroupName, collective: Collective, size: int) -> None:
        """Nothing is sent in a group of one."""
        if self.groups[group].size > 1:
            self._sizes[purpose, group, collective] += size

    def exchanges(self) -> list[Exchange]:
        """All that was added."""
        return [
            Exchange(
                purpose=purpose,
                group=group,
                collective=collective,
                size=size,
                ranks=self.groups[group].size,
            )
            for (purpose, group, collective), size in self._sizes.items()
            if size
        ]


def rank_exchanges(
    config: Config, world_size: int, padded_vocab_size: int
) -> dict[int, list[Exchange]]:
    """By pipeline rank: what each of its ranks sends in a step."""
    found, chunks = {}, model_chunks(config)
    for rank, own in by_rank(chunks).items():
        tally = _Tally(config, world_size)
        for chunk in own:
            _per_microbatch(tally, config, chunk, config.num_microbatches(world_size), len(chunks))
            _per_step(tally, config, chunk, world_size, padded_vocab_size)
        found[rank] = tally.exchanges()
    return found


def _per_microbatch(
    tally: _Tally, config: Config, chunk: Chunk, number: int, num_chunks: int
) -> None:
    sizes = Sizes(config=config, layers=layers_of(config))
    whole = sizes.tokens * config.model.hidden_size * sizes.element * number
    for layer in chunk.layers:
        again = _repetitions(config, chunk, layer)
        _block(tally, config, whole, again.attention)
        _attention_over_context(tally, sizes, number, again.attention)
        if layer in memory_layers(config):
            _memory_layer(tally, sizes, number, again.mlp)
        else:
            _block(tally, config, whole, again.mlp)
    if chunk.has_embedding:
        _embedding(tally, config, whole)
    if chunk.has_loss:
        _output(tally, config, whole)
        # Maxima, label's logits and sums of exponentials, fp32.
        tally.add("loss", "tensor", "all-reduce", 3 * sizes.tokens * 4 * number)
    neighbours = 2 - int(chunk.has_embedding) - int(chunk.has_loss)
    if num_chunks > 1:
        tally.add("between stages", "pipeline", "send", neighbours * sizes.stream * number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Repetitions:
    """How often the forward pass is computed, recompute included."""

    attention: int
    mlp: int


def _repetitions(config: Config, chunk: Chunk, layer: int) -> _Repetitions:
    recompute = config.recompute
    if recompute.recompute_granularity == "full":
        first = recompute.recompute_num_layers or 1
        is_again = recompute.recompute_method == "uniform" or layer in chunk.layers[:first]
        return _Repetitions(attention=1 + is_again, mlp=1 + is_again)
    selected = recompute.recompute_granularity == "selective"
    modules = recompute.recompute_modules or ("core_attn",)
    return _Repetitions(attention=1, mlp=1 + (selected and "mlp" in modules))


def _block(
    tally: _Tally, config: Config, whole: int, forwards: int, *, inward: bool = True
) -> None:
    """A column-parallel matrix, then a row-parallel one; without `inward` only the latter."""
    if not config.parallel.sequence_parallel:
        tally.add("activations", "tensor", "all-reduce", whole * (forwards + inward))
        return
    # Inputs are gathered forward, and again for the weights' gradient; outputs' gradients, too.
    gathers = (forwards + 1) * inward + 1
    tally.add("activations", "tensor", "all-gather", whole * gathers)
    tally.add("activations", "tensor", "reduce-scatter", whole * (forwards + inward))


def _embedding(tally: _Tally, config: Config, whole: int) -> None:
    if not config.parallel.sequence_parallel:
        tally.add("activations", "tensor", "all-reduce", whole)
        return
    # Learned positions are added to whole sequences.
    has_positions = config.model.position_embedding_type == "learned_absolute"
    collective: Collective = "all-reduce" if has_positions else "reduce-scatter"
    tally.add("activations", "tensor", collective, whole)
    tally.add("activations", "tensor", "all-gather", whole)


def _output(tally: _Tally, config: Config, whole: int) -> None:
    if not config.parallel.sequence_parallel:
        tally.add("activations", "tensor", "all-reduce", whole)
        return
    tally.add("activations", "tensor", "all-gather", 2 * whole)
    tally.add("activations", "tensor", "reduce-scatter", whole)


def _attention_over_context(tally: _Tally, sizes: Sizes, number: int, forwards: int) -> None:
    """Transformer Engine's ring: keys and values go round, and in backward their gradients too."""
    model, ranks = sizes.config.model, sizes.config.parallel.context_parallel_size
    groups_here = max(1, model.num_query_groups // sizes.ranks)
    part = 2 * sizes.tokens * groups_here * model.kv_channels * sizes.element * number
    rounds = forwards + 2
    size = part * (ranks - 1) * rounds
    tally.add("attention of other parts of the sequence", "context", "send", size)


def _memory_layer(tally: _Tally, sizes: Sizes, number: int, forwards: int) -> None:
    config, e = sizes.config, sizes.element
    memory = config.memory
    whole = sizes.tokens * config.model.hidden_size * e * number
    _routes(tally, sizes, number, forwards)
    columns = sizes.tokens * (memory.value_dim // sizes.ranks) * e * number
    both = columns * (forwards + 1)
    tally.add("memory: looked-up sums", "neighbours", "all-to-all", both)
    if memory.variant == "peer":
        _peer(tally, sizes, number, forwards, columns)
    if projects_output(config):
        _block(tally, config, whole, forwards, inward=memory.variant == "memory+")
    elif config.parallel.sequence_parallel:
        tally.add("memory: looked-up sums", "tensor", "all-to-all", both)
    else:
        tally.add(
            "memory: looked-up sums", "tensor", "all-gather", columns * sizes.ranks * forwards
        )


def _routes(tally: _Tally, sizes: Sizes, number: int, forwards: int) -> None:
    """Slots (int32) and weights (fp32) forward, the weights' gradients backward."""
    memory = sizes.config.memory
    rows = memory.num_heads * (memory.top_k + memory.num_random_values)
    own = sizes.own_tokens * rows * memory.parallel_size * number
    purpose: Purpose = "memory: slots and weights"
    tally.add(purpose, "neighbours", "all-gather", 8 * own * forwards)
    tally.add(purpose, "neighbours", "reduce-scatter", 4 * own)
    if not sizes.config.parallel.sequence_parallel:
        tally.add(purpose, "tensor", "all-reduce", 4 * sizes.tokens * rows * number)
        return
    tally.add(purpose, "tensor", "all-gather", 8 * own * sizes.ranks * forwards)
    tally.add(purpose, "tensor", "reduce-scatter", 4 * own * sizes.ranks)


def _peer(tally: _Tally, sizes: Sizes, number: int, forwards: int, columns: int) -> None:
    config = sizes.config
    memory = config.memory
    purpose: Purpose = "memory: PEER's inputs and products"
    rows = memory.num_heads * (memory.top_k + memory.num_random_values)
    products = sizes.tokens * memory.parallel_size * rows * 4 * number
    tally.add(purpose, "memory", "all-reduce", products * (forwards + 1))
    tally.add(purpose, "neighbours", "all-to-all", columns * (forwards + 1))
    whole = sizes.tokens * config.model.hidden_size * sizes.element * number
    if config.parallel.sequence_parallel:
        tally.add(purpose, "tensor", "all-gather", whole * forwards)
        tally.add(purpose, "tensor", "reduce-scatter", whole)
    else:
        tally.add(purpose, "tensor", "all-reduce", whole)


def _per_step(
    tally: _Tally, config: Config, chunk: Chunk, world_size: int, padded_vocab_size: int
) -> None:
    found = chunk_weights(config, chunk, padded_vocab_size)
    gradient = gradient_element(config)
    summed = ("always", "sequence") if config.parallel.sequence_parallel else ("always",)
    replicated = sum(size_on_rank(config, w) for w in found if w.summed in summed)
    tally.add("replicated weights' gradients", "tensor", "all-reduce", replicated * gradient)
    values = [weight for weight in found if weight.part == "values"]
    rest = [weight for weight in found if weight.part != "values"]
    for buffer in buffers(config, rest, world_size):
        group: GroupName = "data" if buffer.ranks == tally.groups["data"].size else "copies"
        _reduce(tally, config, group, buffer.padded, "gradients", "weights")
    for buffer in buffers(config, values, world_size):
        _reduce(tally, config, "copies", buffer.padded, "values' gradients", "values' weights")


def _reduce(
    tally: _Tally,
    config: Config,
    group: GroupName,
    number: int,
    of_gradients: Purpose,
    of_weights: Purpose,
) -> None:
    parallel = config.parallel
    gradients = number * gradient_element(config)
    if not parallel.use_distributed_optimizer:
        tally.add(of_gradients, group, "all-reduce", gradients)
        return
    tally.add(of_gradients, group, "reduce-scatter", gradients)
    # Without overlap each of two chained optimizers has all weights gathered after its update.
    times = 2 if config.memory.enabled and not parallel.overlap_param_gather else 1
    tally.add(of_weights, group, "all-gather", times * number * element(config))
