"""`--dry-run`: what a configuration would cost, by arithmetic, on one process and without a GPU."""

import itertools
import os
import sys
from collections.abc import Iterator

from megatron_memory.config import Config, check_config
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.planning.communication import rank_exchanges
from megatron_memory.planning.flops import flops_per_token
from megatron_memory.planning.memory import fullest, rank_memories
from megatron_memory.planning.parameters import Part, count, weights
from megatron_memory.planning.report import bytes_text, unchecked
from megatron_memory.planning.stages import by_rank, rank_pools, stage_weights
from megatron_memory.planning.states import StateBytes, gradient_element


def dry_run(config: Config) -> int:
    """Check the configuration and print its figures; returns the exit code.

    The number of ranks is `WORLD_SIZE`, which torchrun sets and a user may set for any number; else
    as few as the parallel sizes need.

    Raises:
        ConfigurationError: the configuration cannot work with so many ranks.
        DataError: the tokenizer cannot be read.
    """
    smallest = config.model_parallel_size * config.expert_group_size
    world_size = int(os.environ.get("WORLD_SIZE", smallest))
    check_config(config, world_size)
    from megatron_memory.runtime import prepare_megatron

    prepare_megatron("cpu")
    from megatron_memory.data.tokenizers import check_vocab_size, padded_vocab_size
    from megatron_memory.training.program import tokenizer_of

    vocab_size = check_vocab_size(tokenizer_of(config), config.data.vocab_size)
    padded = padded_vocab_size(
        vocab_size,
        config.data.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )
    if os.environ.get("RANK", "0") == "0":
        for line in describe(config, world_size, vocab_size, padded):
            print(line)
        sys.stdout.flush()
    return 0


def describe(config: Config, world_size: int, vocab_size: int, padded: int) -> Iterator[str]:
    """The lines of a dry run.

    Args:
        config: checked for `world_size` ranks.
        world_size: ranks of the run.
        vocab_size: tokens.
        padded: rows of the embedding.
    """
    yield f"Vocabulary: {vocab_size:,} tokens, padded to {padded:,}"
    yield from _parameters(config, padded)
    yield from _placement(config, world_size)
    yield from _memory(config, world_size, padded)
    yield from _communication(config, world_size, padded)
    for note in unchecked(config):
        yield f"Not checked: {note}"
    yield from _flops(config, padded)
    yield from _batch(config, world_size)


def _parameters(config: Config, padded: int) -> Iterator[str]:
    whole = count(config, weights(config, padded), on_one_rank=False)
    ranks = [
        count(
            config, [w for s in stages for w in stage_weights(config, s, padded)], on_one_rank=True
        )
        for stages in by_rank(config).values()
    ]
    names: dict[Part, str] = {
        "dense": "dense (all but the following)",
        "router": "memory queries and keys",
        "values": "memory values",
        "experts": "experts",
    }
    each = "on each rank" if len(ranks) == 1 else "on each rank at most"
    most = max(sum(of_rank.values()) for of_rank in ranks)
    yield f"Parameters: {sum(whole.values()):,}; {each} {most:,}"
    for part, name in names.items():
        if whole[part]:
            most = max(of_rank[part] for of_rank in ranks)
            yield f"  {name}: {whole[part]:,}; {each} {most:,}"


def _placement(config: Config, world_size: int) -> Iterator[str]:
    parallel, memory = config.parallel, config.memory
    ranks, stages = parallel.tensor_model_parallel_size, by_rank(config)
    sizes = f"{ranks} tensor-parallel x {config.data_parallel_size(world_size)} data-parallel"
    if parallel.context_parallel_size > 1:
        sizes += f" x {parallel.context_parallel_size} context-parallel"
    if len(stages) == 1:
        last = config.model.num_layers - 1
        yield f"Placement: {world_size} ranks = {sizes}; layers 0 to {last} on every rank"
    else:
        yield f"Placement: {world_size} ranks = {sizes} x {len(stages)} pipeline"
        yield from _stages(config, world_size // len(stages))
    layers = memory_layers(config)
    if not layers:
        return
    where = "beside their MLPs, " if memory.beside_mlp else ""
    yield (
        f"  memory layers {', '.join(map(str, layers))} (counted from 0), "
        f"{where}{_tables(config)}: {memory.num_values:,} rows of {memory.value_dim}"
    )
    which = {"auto": "Triton on GPUs that run it, else torch", "triton": "Triton", "torch": "torch"}
    read = "in fp8" if memory.fp8_values else "as they are stored"
    yield f"  kernels: {which[memory.kernels]}; values are read {read}"
    yield from _columns(config, world_size)


def _tables(config: Config) -> str:
    pools = memory_pools(config)
    if len(pools) == 1:
        return "one table for all"
    if config.memory.share_scope == "layer":
        return "a table for each"
    return "tables for " + "; ".join(", ".join(map(str, pool.layers)) for pool in pools)


def _stages(config: Config, ranks_per_stage: int) -> Iterator[str]:
    """Which layers and tables each pipeline rank has."""
    with_memory = memory_layers(config)
    for rank, stages in by_rank(config).items():
        parts = []
        for stage in stages:
            ends = ["embedding"] * stage.has_embedding
            if stage.layers:
                ends.append(f"{stage.layers[0]} to {stage.layers[-1]}")
            parts.append(" + ".join([*ends, *["output"] * stage.has_loss]))
        reading = [layer for s in stages for layer in s.layers if layer in with_memory]
        held = ", ".join(pool.name for pool in rank_pools(config, rank))
        tables = f"; memory layers {', '.join(map(str, reading))}, table {held}" if reading else ""
        first = rank * ranks_per_stage
        span = f"{first} to {first + ranks_per_stage - 1}" if ranks_per_stage > 1 else f"{first}"
        yield f"  pipeline rank {rank} (ranks {span}): layers {' | '.join(parts)}{tables}"


_MOST_BLOCKS = 8
"""Of columns, that are listed one by one."""
_MOST_MEMBERS = 3
"""Ranks that are listed of those with the same columns; a run may have millions."""


def _columns(config: Config, world_size: int) -> Iterator[str]:
    """Which ranks have which of a table's columns."""
    neighbours, ranks = config.memory.parallel_size, config.parallel.tensor_model_parallel_size
    if neighbours > 1:
        yield (
            f"  groups of {ranks * neighbours} ranks share a table's columns: {ranks} "
            f"tensor-parallel x {neighbours} data-parallel neighbours"
        )
    stages = by_rank(config)
    size = world_size // len(stages)
    holding = [rank for rank in stages if rank_pools(config, rank)]
    columns = config.memory.value_dim // (ranks * neighbours)
    blocks = range(ranks * neighbours)
    shown = [*blocks] if len(blocks) <= _MOST_BLOCKS else [*blocks[: _MOST_BLOCKS - 1], blocks[-1]]
    for block in shown:
        first = block * columns
        # A rank of the group counts tensor-parallel ranks first, a block neighbours first.
        member = block // neighbours + block % neighbours * ranks
        all_members = (
            r for h in holding for r in range(h * size + member, (h + 1) * size, ranks * neighbours)
        )
        members = list(itertools.islice(all_members, _MOST_MEMBERS + 1))
        dots = "... " if block == blocks[-1] and len(shown) < len(blocks) else ""
        yield (
            f"  {dots}{_members(members)}: columns {first} to {first + columns - 1} of the tables "
            "held there"
        )


def _members(members: list[int]) -> str:
    if len(members) == 1:
        return f"rank {members[0]}"
    shown = ", ".join(map(str, members[:_MOST_MEMBERS]))
    shown += ", ..." if len(members) > _MOST_MEMBERS else ""
    return f"ranks {shown}"


def _memory(config: Config, world_size: int, padded: int) -> Iterator[str]:
    memories = rank_memories(config, world_size, padded)
    rank = fullest(memories)
    if len(memories) == 1:
        yield f"Memory on each rank: {bytes_text(rank.total)} and the allocator's overhead"
    else:
        yield (
            f"Memory on each rank of pipeline rank {rank.rank}, the fullest: "
            f"{bytes_text(rank.total)} and the allocator's overhead"
        )
    for name, states in {"values": rank.values, "the rest": rank.rest}.items():
        if states.total:
            yield f"  {name}: {_states(config, states)}"
    if rank.shadow:
        yield f"  values in fp8, with a scale a row: {bytes_text(rank.shadow)}"
    if rank.counters:
        yield f"  counts of the slots read: {bytes_text(rank.counters)}"
    yield (
        f"  activations: {bytes_text(sum(rank.activations.values()))} kept"
        + (f" of {sum(rank.held)} microbatches in flight" if len(memories) > 1 else "")
        + f", {bytes_text(rank.working)} of temporaries, "
        f"{bytes_text(rank.gathered + rank.passed)} for what other ranks send"
    )
    if len(memories) > 1:
        totals = ", ".join(f"{m.rank}: {bytes_text(m.total)}" for m in memories)
        yield f"  by pipeline rank: {totals}"


def _states(config: Config, states: StateBytes) -> str:
    bf16 = config.precision.bf16
    return (
        f"weights ({'bf16' if bf16 else 'fp32'}) {bytes_text(states.weights)}, gradients "
        f"({'fp32' if gradient_element(config) == 4 else 'bf16'}) {bytes_text(states.gradients)}, "
        + (f"main weights (fp32) {bytes_text(states.main_weights)}, " if bf16 else "")
        + f"optimizer states (fp32) {bytes_text(states.optimizer_states)}"
    )


def _communication(config: Config, world_size: int, padded: int) -> Iterator[str]:
    """Of the pipeline rank that sends the most."""
    if world_size == 1:
        return
    ranks = rank_exchanges(config, world_size, padded)
    rank = max(ranks, key=lambda rank: sum(exchange.sent for exchange in ranks[rank]))
    exchanges = sorted(ranks[rank], key=lambda exchange: -exchange.sent)
    total = sum(exchange.sent for exchange in exchanges)
    where = "Each rank" if len(ranks) == 1 else f"Each rank of pipeline rank {rank}"
    yield f"{where} sends {bytes_text(total)} in a step"
    for exchange in exchanges:
        group = exchange.group
        yield (
            f"  {exchange.purpose} ({group.name}, {group.size} ranks): "
            f"{exchange.collective} {bytes_text(exchange.sent)}"
        )


def _flops(config: Config, padded: int) -> Iterator[str]:
    parts = flops_per_token(config, padded)
    total = sum(parts.values())
    yield (
        f"FLOPs of a training token: {total:,}, a multiply-add counted as two, the backward pass "
        "as two forward ones (values are not FLOPs: only the rows read are summed)"
    )
    for name, number in parts.items():
        yield f"  {name}: {number:,} ({number / total:.1%})"


def _batch(config: Config, world_size: int) -> Iterator[str]:
    training = config.training
    tokens = training.global_batch_size * config.model.seq_length
    yield (
        f"Tokens: {tokens:,} a step ({training.global_batch_size} sequences of "
        f"{config.model.seq_length}; {config.num_microbatches(world_size)} microbatches of "
        f"{training.micro_batch_size} on each rank), {tokens * training.train_iters:,} in "
        f"{training.train_iters:,} iterations"
    )
