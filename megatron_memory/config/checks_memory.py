"""Checks of the memory layers' settings."""

from collections.abc import Iterator

from megatron_memory.config.pool_layouts import pool_problems
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.config.schema import Config
from megatron_memory.exceptions import ConfigurationError

MIN_COLUMNS = 32
"""Of a row on one rank, where `--memory-parallel-size` splits it: 64 bytes of bf16, two sectors of
a GPU's memory, and the blocks in which tables are initialised."""


def memory_problems(config: Config) -> Iterator[str]:
    """Messages for all that cannot work; none for a model without memory."""
    if config.memory.enabled:
        yield from _placement_problems(config)
        yield from _shape_problems(config)
        yield from _combination_problems(config)
        yield from _value_optimizer_problems(config)


def _placement_problems(config: Config) -> Iterator[str]:
    memory = config.memory
    if memory.share_groups is not None and memory.share_scope != "stage":
        yield (
            f"--memory-share-groups {memory.share_groups} belongs to --memory-share-scope stage, "
            f"which is {memory.share_scope}: change it, or leave the groups away."
        )
    try:
        memory_layers(config)
    except ConfigurationError as error:
        yield str(error)
        return
    try:
        memory_pools(config)
        yield from pool_problems(config)
    except ConfigurationError as error:
        # Of the stages: checks_parallel says the same, and it is told once.
        yield str(error)


def _shape_problems(config: Config) -> Iterator[str]:
    memory = config.memory
    yield from _column_problems(config)
    if memory.key_dim < 2:
        yield (
            f"--memory-key-dim {memory.key_dim}, half of --memory-value-dim {memory.value_dim} "
            "without the flag: must be at least 2."
        )
    if memory.key_dim % 2:
        yield (
            f"--memory-key-dim {memory.key_dim} is odd: a key has two halves. "
            f"Choose {memory.key_dim + 1}."
        )
    if memory.top_k > memory.num_half_keys:
        yield (
            f"--memory-top-k {memory.top_k} exceeds --memory-num-half-keys "
            f"{memory.num_half_keys}: a head reads that many of each set's half-keys. Lower the "
            "first, or raise the second."
        )
    if memory.num_random_values > memory.num_values:
        yield (
            f"--memory-num-random-values {memory.num_random_values} exceeds the table's "
            f"{memory.num_values} rows (--memory-num-half-keys {memory.num_half_keys}, squared): "
            "lower it."
        )
    if memory.variant == "peer" and memory.value_dim != config.model.hidden_size:
        yield (
            f"--memory-value-dim {memory.value_dim} differs from --hidden-size "
            f"{config.model.hidden_size}: with --memory-variant peer, rows are multiplied by the "
            "layer's input. Leave --memory-value-dim away."
        )


def _column_problems(config: Config) -> Iterator[str]:
    width, neighbours = config.memory.value_dim, config.memory.parallel_size
    tensor_ranks = config.parallel.tensor_model_parallel_size
    ranks, shown = tensor_ranks, f"--tensor-model-parallel-size {tensor_ranks}"
    if neighbours > 1:
        ranks *= neighbours
        shown += f" x --memory-parallel-size {neighbours} = {ranks}"
    if width % ranks:
        lower = width // ranks * ranks
        nearest = f"{lower} or {lower + ranks}" if lower else f"{ranks}"
        yield (
            f"--memory-value-dim {width} is not divisible by {shown}: each rank holds an equal "
            f"number of the table's columns. Choose for example {nearest}."
        )
    elif neighbours > 1 and width // ranks < MIN_COLUMNS:
        fitting = [m for m in range(1, neighbours) if width % (tensor_ranks * m) == 0]
        most = max(m for m in fitting if m == 1 or width // (tensor_ranks * m) >= MIN_COLUMNS)
        yield (
            f"--memory-value-dim {width} / ({shown}) leaves each rank {width // ranks} columns of "
            f"the table: rows are read at random, and fewer than {MIN_COLUMNS} columns of bf16 "
            f"waste most of each read. Give --memory-parallel-size {most}, or at least "
            f"--memory-value-dim {MIN_COLUMNS * ranks}."
        )


def _combination_problems(config: Config) -> Iterator[str]:
    memory = config.memory
    if config.model.num_experts is not None:
        yield (
            f"--memory-layers {memory.layers} and --num-experts {config.model.num_experts} "
            "cannot be in one model yet: leave one of them away."
        )
    if memory.fp8_values and not config.precision.bf16:
        yield (
            "--memory-fp8-values halves the bytes of bf16 values, and this run computes in fp32: "
            "add --bf16, or omit it."
        )


def _value_optimizer_problems(config: Config) -> Iterator[str]:
    memory = config.memory
    if memory.value_min_lr > memory.value_lr:
        yield (
            f"--memory-value-min-lr {memory.value_min_lr} exceeds --memory-value-lr "
            f"{memory.value_lr}: lower it."
        )
