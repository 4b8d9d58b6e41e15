"""`--dry-run`: what a configuration would cost, by arithmetic, on one process and without a GPU."""

import os
import sys
from collections.abc import Iterator

from megatron_memory.config import Config, check_config
from megatron_memory.planning.flops import flops_per_token
from megatron_memory.planning.memory import fullest, rank_memories
from megatron_memory.planning.parameters import Part, count, memory_layers, weights


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
    yield from _flops(config, padded)
    yield from _batch(config, world_size)


def _parameters(config: Config, padded: int) -> Iterator[str]:
    found = weights(config, padded)
    whole = count(config, found, on_one_rank=False)
    one = count(config, found, on_one_rank=True)
    names: dict[Part, str] = {
        "dense": "dense (all but the following)",
        "router": "memory queries and keys",
        "values": "memory values",
        "experts": "experts",
    }
    yield f"Parameters: {sum(whole.values()):,}; on each rank {sum(one.values()):,}"
    for part, name in names.items():
        if whole[part]:
            yield f"  {name}: {whole[part]:,}; on each rank {one[part]:,}"


def _placement(config: Config, world_size: int) -> Iterator[str]:
    parallel, memory = config.parallel, config.memory
    ranks = parallel.tensor_model_parallel_size
    yield (
        f"Placement: {world_size} ranks = {ranks} tensor-parallel x "
        f"{config.data_parallel_size(world_size)} data-parallel; layers 0 to "
        f"{config.model.num_layers - 1} on every rank"
    )
    layers = memory_layers(config)
    if not layers:
        return
    shared = memory.share_scope == "model"
    table = "one table for all" if shared else "a table for each"
    yield (
        f"  memory layers {', '.join(map(str, layers))} (counted from 0), {table}: "
        f"{memory.num_values:,} rows of {memory.value_dim}"
    )
    which = {"auto": "Triton on GPUs that run it, else torch", "triton": "Triton", "torch": "torch"}
    read = "in fp8" if memory.fp8_values else "as they are stored"
    yield f"  kernels: {which[memory.kernels]}; values are read {read}"
    neighbours = memory.parallel_size
    if neighbours > 1:
        yield (
            f"  groups of {ranks * neighbours} ranks share a table's columns: {ranks} "
            f"tensor-parallel x {neighbours} data-parallel neighbours"
        )
    columns = memory.value_dim // (ranks * neighbours)
    for block in range(ranks * neighbours):
        first = block * columns
        # A rank of the group counts tensor-parallel ranks first, a block neighbours first.
        member = block // neighbours + block % neighbours * ranks
        members = _members(member, ranks * neighbours, world_size)
        yield f"  {members}: columns {first} to {first + columns - 1} of each table"


def _members(first: int, step: int, world_size: int) -> str:
    members = list(range(first, world_size, step))
    if len(members) == 1:
        return f"rank {members[0]}"
    shown = ", ".join(map(str, members[:3])) + (", ..." if len(members) > 3 else "")
    return f"ranks {shown}"


def _memory(config: Config, world_size: int, padded: int) -> Iterator[str]:
    rank = fullest(rank_memories(config, world_size, padded))
    bf16 = config.precision.bf16
    kind = "bf16" if bf16 else "fp32"
    reduced = bf16 and not config.precision.accumulate_allreduce_grads_in_fp32
    yield f"Memory on each rank: {_bytes(rank.total)} and the allocator's overhead"
    for name, states in {"values": rank.values, "the rest": rank.rest}.items():
        if not states.total:
            continue
        yield (
            f"  {name}: weights ({kind}) {_bytes(states.weights)}, gradients "
            f"({'bf16' if reduced else 'fp32'}) {_bytes(states.gradients)}, "
            + (f"main weights (fp32) {_bytes(states.main_weights)}, " if bf16 else "")
            + f"optimizer states (fp32) {_bytes(states.optimizer_states)}"
        )
    if rank.shadow:
        yield f"  values in fp8, with a scale a row: {_bytes(rank.shadow)}"
    yield (
        f"  activations: {_bytes(sum(rank.activations.values()))} kept, {_bytes(rank.working)} of "
        f"temporaries, {_bytes(rank.buffers)} for what is gathered"
    )


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


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
