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
from megatron_memory.config.pipeline import Stage
from megatron_memory.config.pools import memory_layers, mlp_layers
from megatron_memory.planning.activations import Sizes, layers_of
from megatron_memory.planning.groups import (
    Collective,
    Group,
    GroupName,
    groups,
    replicas,
    sent_bytes,
)
from megatron_memory.planning.parameters import projects_output, size_on_rank
from megatron_memory.planning.stages import by_rank, rank_pools, stage_weights
from megatron_memory.planning.states import buffers, element, gradient_element, padded_size

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
    "gradients of copies",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
    """Collectives of one kind, of one rank in one step."""

    purpose: Purpose
    group: Group
    collective: Collective
    size: int
    """Bytes of the whole tensors, over the step."""

    @property
    def sent(self) -> int:
        """Bytes that the rank sends, see `sent_bytes`."""
        return sent_bytes(self.collective, self.size, self.group.size)


class _Tally:
    """Sums exchanges of a kind."""

    def __init__(self, config: Config, world_size: int):
        self.groups = groups(config, world_size)
        self._sizes: collections.Counter[tuple[Purpose, Group, Collective]] = collections.Counter()

    def add(
        self, purpose: Purpose, group: GroupName | Group, collective: Collective, size: int
    ) -> None:
        """Nothing is sent in a group of one."""
        members = group if isinstance(group, Group) else self.groups[group]
        if members.size > 1:
            self._sizes[purpose, members, collective] += size

    def exchanges(self) -> list[Exchange]:
        """All that was added."""
        return [
            Exchange(purpose=purpose, group=group, collective=collective, size=size)
            for (purpose, group, collective), size in self._sizes.items()
            if size
        ]


def rank_exchanges(
    config: Config, world_size: int, padded_vocab_size: int
) -> dict[int, list[Exchange]]:
    """By pipeline rank: what each of its ranks sends in a step."""
    found = {}
    for rank, stages in by_rank(config).items():
        tally = _Tally(config, world_size)
        for stage in stages:
            _per_microbatch(tally, config, stage, config.num_microbatches(world_size))
            _per_step(tally, config, stage, world_size, padded_vocab_size)
        found[rank] = tally.exchanges()
    return found


def _per_microbatch(tally: _Tally, config: Config, stage: Stage, number: int) -> None:
    sizes = Sizes(config=config, layers=layers_of(config))
    whole = sizes.tokens * config.model.hidden_size * sizes.element * number
    for layer in stage.layers:
        again = _repetitions(config, stage, layer)
        _block(tally, config, whole, again.attention)
        _attention_over_context(tally, sizes, number, again.attention)
        if layer in memory_layers(config):
            _memory_layer(tally, sizes, number, again.memory)
        if layer in mlp_layers(config):
            _block(tally, config, whole, again.mlp)
    if stage.has_embedding:
        _embedding(tally, config, whole)
    if stage.has_loss:
        _output(tally, config, whole)
        # Maxima, label's logits and sums of exponentials, fp32.
        tally.add("loss", "tensor", "all-reduce", 3 * sizes.tokens * 4 * number)
    neighbours = 2 - int(stage.has_embedding) - int(stage.has_loss)
    tally.add("between stages", "pipeline", "send", neighbours * sizes.stream * number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Repetitions:
    """How often the forward pass is computed, recompute included."""

    attention: int
    mlp: int
    memory: int


def _repetitions(config: Config, stage: Stage, layer: int) -> _Repetitions:
    recompute = config.recompute
    if recompute.recompute_granularity == "full":
        first = recompute.recompute_num_layers or 1
        is_again = recompute.recompute_method == "uniform" or layer in stage.layers[:first]
        return _Repetitions(attention=1 + is_again, mlp=1 + is_again, memory=1 + is_again)
    selected = recompute.recompute_granularity == "selective"
    modules = recompute.recompute_modules or ("core_attn",)
    mlp = 1 + (selected and "mlp" in modules)
    # With both modules the memories keep to their own.
    return _Repetitions(attention=1, mlp=mlp, memory=1 if "memory" in modules else mlp)


def _block(
    tally: _Tally,
    config: Config,
    whole: int,
    forwards: int,
    *,
    inward: bool = True,
    inward_again: bool = False,
) -> None:
    """A column-parallel matrix, then a row-parallel one; without `inward` only the latter.
    `inward_again`: the first is computed once more in backward."""
    if not config.parallel.sequence_parallel:
        tally.add("activations", "tensor", "all-reduce", whole * (forwards + inward))
        return
    # Inputs are gathered forward, and again for the weights' gradient; outputs' gradients, too.
    gathers = (forwards + 1 + inward_again) * inward + 1
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
        inward, again = memory.variant == "memory+", sizes.recomputes("memory")
        _block(tally, config, whole, forwards, inward=inward, inward_again=again)
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
    tally: _Tally, config: Config, stage: Stage, world_size: int, padded_vocab_size: int
) -> None:
    found = stage_weights(config, stage, padded_vocab_size)
    gradient = gradient_element(config)
    summed = ("always", "sequence") if config.parallel.sequence_parallel else ("always",)
    replicated = sum(size_on_rank(config, w) for w in found if w.summed in summed)
    tally.add("replicated weights' gradients", "tensor", "all-reduce", replicated * gradient)
    # Without overlap each chained optimizer has all weights gathered after its update.
    times = 1 + bool(rank_pools(config, stage.rank))
    if config.parallel.overlap_param_gather:
        times = 1
    values = [weight for weight in found if weight.part == "values"]
    rest = [weight for weight in found if weight.part != "values"]
    for buffer in buffers(config, rest, world_size):
        group: GroupName = "data" if buffer.ranks == tally.groups["data"].size else "copies"
        _reduce(tally, config, group, buffer.padded, times, ("gradients", "weights"))
    for buffer in buffers(config, values, world_size):
        purposes: tuple[Purpose, Purpose] = ("values' gradients", "values' weights")
        _reduce(tally, config, "copies", buffer.padded, times, purposes)
    for weight in found:
        if weight.copies:
            size = size_on_rank(config, weight)
            if weight.part == "values" and config.parallel.use_distributed_optimizer:
                # Each data-parallel rank its share.
                ranks = tally.groups["copies"].size
                size = padded_size(config, [size], ranks) // ranks
            group_of = replicas(config, world_size, weight.copies)
            tally.add("gradients of copies", group_of, "all-reduce", size * gradient)


def _reduce(
    tally: _Tally,
    config: Config,
    group: GroupName,
    number: int,
    times: int,
    purposes: tuple[Purpose, Purpose],
) -> None:
    """Of a buffer's gradients, and where these are shared out, a gathering of its weights."""
    gradients = number * gradient_element(config)
    if not config.parallel.use_distributed_optimizer:
        tally.add(purposes[0], group, "all-reduce", gradients)
        return
    tally.add(purposes[0], group, "reduce-scatter", gradients)
    tally.add(purposes[1], group, "all-gather", times * number * element(config))
