"""Checks of the parallel sizes, and of the batch and model against them."""

import math
from collections.abc import Iterator

from megatron_memory.config.pipeline import num_chunks
from megatron_memory.config.schema import Config
from megatron_memory.exceptions import ConfigurationError


def parallel_problems(config: Config, world_size: int) -> Iterator[str]:
    """Messages for all that cannot work with `world_size` ranks."""
    yield from _tensor_split_problems(config)
    yield from _sequence_split_problems(config)
    yield from _context_split_problems(config)
    yield from _overlap_problems(config)
    yield from _pipeline_problems(config, world_size)
    yield from _world_size_problems(config, world_size)


def _tensor_split_problems(config: Config) -> Iterator[str]:
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    split = {
        "--num-attention-heads": model.num_attention_heads,
        "--ffn-hidden-size": model.ffn_hidden_size,
    }
    if model.num_experts is not None:
        split["--moe-ffn-hidden-size"] = model.moe_ffn_hidden_size
    for flag, size in split.items():
        if size % ranks:
            yield (
                f"{flag} {size} is not divisible by --tensor-model-parallel-size {ranks}: "
                f"each rank holds an equal share. Choose a multiple of {ranks}."
            )
    groups = model.num_query_groups
    if groups % ranks and ranks % groups:
        yield (
            f"--num-query-groups {groups} is neither a multiple nor a divisor of "
            f"--tensor-model-parallel-size {ranks}: change one of them."
        )


def _sequence_split_problems(config: Config) -> Iterator[str]:
    ranks, seq_length = config.parallel.tensor_model_parallel_size, config.model.seq_length
    context = config.parallel.context_parallel_size
    if not config.parallel.sequence_parallel:
        return
    if ranks == 1:
        yield (
            "--sequence-parallel splits sequences over the tensor-parallel ranks, and "
            "--tensor-model-parallel-size is 1: raise it, or leave --sequence-parallel away "
            "(--no-sequence-parallel undoes a configuration file)."
        )
    elif seq_length % (context * ranks) and context == 1:
        yield (
            f"--seq-length {seq_length} is not divisible by --tensor-model-parallel-size {ranks}, "
            f"as --sequence-parallel needs: choose a multiple of {ranks}."
        )
    elif seq_length % (context * ranks):
        yield (
            f"--seq-length {seq_length} is not divisible by --context-parallel-size {context} x "
            f"--tensor-model-parallel-size {ranks}, as --sequence-parallel needs: choose a "
            f"multiple of {math.lcm(2 * context, context * ranks)}."
        )


def _context_split_problems(config: Config) -> Iterator[str]:
    ranks, seq_length = config.parallel.context_parallel_size, config.model.seq_length
    if ranks == 1:
        return
    if seq_length % (2 * ranks):
        yield (
            f"--seq-length {seq_length} is not divisible by 2 x --context-parallel-size {ranks}: "
            "each rank has one piece from the front half of a sequence and one from the back. "
            f"Choose a multiple of {2 * ranks}."
        )
    if config.data.reset_attention_mask:
        yield (
            f"--reset-attention-mask does not work with --context-parallel-size {ranks}, whose "
            "attention makes its own causal mask: leave one of them away."
        )
    if config.model.transformer_impl == "local":
        yield (
            f"--context-parallel-size {ranks} splits attention over ranks, which "
            "--transformer-impl local cannot do: use --transformer-impl transformer_engine on "
            "GPUs, or --context-parallel-size 1 with --sequence-parallel or "
            "--recompute-activations for long sequences."
        )


def _overlap_problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if not parallel.overlap_param_gather:
        return
    needed = {
        "--use-distributed-optimizer": parallel.use_distributed_optimizer,
        "--overlap-grad-reduce": parallel.overlap_grad_reduce,
    }
    for flag, given in needed.items():
        if not given:
            yield f"--overlap-param-gather needs {flag}: add it, or leave the former away."


def _pipeline_problems(config: Config, world_size: int) -> Iterator[str]:
    try:
        stages = config.stages
    except ConfigurationError as error:
        yield str(error)
        return
    if num_chunks(stages) > 1:
        yield from _interleaving_problems(config, world_size)


def _interleaving_problems(config: Config, world_size: int) -> Iterator[str]:
    """megatron-core's conditions on the microbatches of an interleaved schedule."""
    parallel, ranks = config.parallel, config.parallel.pipeline_model_parallel_size
    group = parallel.microbatch_group_size_per_virtual_pipeline_stage or ranks
    flag = f"--microbatch-group-size-per-virtual-pipeline-stage {group}"
    if not config.divides_batch(world_size):
        return
    microbatches = config.num_microbatches(world_size)
    shown = (
        f"{microbatches} microbatches a rank (--global-batch-size "
        f"{config.training.global_batch_size} / --micro-batch-size "
        f"{config.training.micro_batch_size} / {config.data_parallel_size(world_size)} "
        "data-parallel ranks)"
    )
    if group < ranks:
        yield (
            f"{flag} is smaller than --pipeline-model-parallel-size {ranks}: an interleaved "
            "pipeline would wait for itself. Omit it, or raise it."
        )
    elif microbatches < group:
        yield (
            f"An interleaved pipeline needs at least {group} microbatches a rank, and there are "
            f"{shown}: raise --global-batch-size, or do without interleaving."
        )
    elif 0 < microbatches % group < ranks:
        yield (
            f"{shown}: {microbatches % group} are left after groups of {group} ({flag}), fewer "
            f"than --pipeline-model-parallel-size {ranks}. Choose a --global-batch-size that "
            f"gives a multiple of {group} microbatches."
        )


def _world_size_problems(config: Config, world_size: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    model_ranks = config.model_parallel_size
    sizes = (
        f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} x "
        f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} x "
        f"--context-parallel-size {parallel.context_parallel_size}"
    )
    if world_size % model_ranks:
        yield (
            f"The run has {world_size} processes, which is not a multiple of {sizes} = "
            f"{model_ranks}: start torchrun with a multiple of {model_ranks} processes, or lower "
            "the sizes."
        )
        return
    copies = config.data_parallel_size(world_size)
    yield from _neighbour_problems(config, world_size, sizes)
    sequences = training.micro_batch_size * copies
    if training.global_batch_size % sequences:
        yield (
            f"--global-batch-size {training.global_batch_size} is not divisible by "
            f"--micro-batch-size {training.micro_batch_size} x {copies} data-parallel ranks = "
            f"{sequences}: choose a multiple of {sequences}, or a smaller --micro-batch-size."
        )


def _neighbour_problems(config: Config, world_size: int, sizes: str) -> Iterator[str]:
    """Megatron's expert groups, whose ranks are neighbours in data and context parallelism."""
    context, model_ranks = config.parallel.context_parallel_size, config.model_parallel_size
    ranks, kind = config.data_parallel_size(world_size) * context, "data-parallel ranks"
    if context > 1:
        kind = "data- and context-parallel ranks"
    experts = config.parallel.expert_model_parallel_size
    if ranks % experts:
        yield (
            f"The run has {world_size} processes, so {ranks} {kind}, which is not a multiple of "
            f"--expert-model-parallel-size {experts}: start more processes, or lower that size."
        )
    neighbours = config.memory.parallel_size
    if ranks % neighbours:
        smallest = math.lcm(model_ranks, model_ranks // context * neighbours)
        yield (
            f"The run has {world_size} processes, so {ranks} {kind} ({sizes} = {model_ranks} "
            f"processes for a copy of the model), which is not a multiple of "
            f"--memory-parallel-size {neighbours}: that many share a table's columns. Start a "
            f"multiple of {smallest} processes, or give --memory-parallel-size "
            f"{math.gcd(ranks, neighbours)}."
        )
