"""The fastest layouts that fit, among all that `check_config` accepts."""

import dataclasses
import itertools
from collections.abc import Iterator

from megatron_memory.config import Config, RecomputeConfig, check_config
from megatron_memory.config.checks_memory import MIN_COLUMNS
from megatron_memory.config.flags import all_flags, flag_name
from megatron_memory.config.pipeline import without_stage_flags
from megatron_memory.config.pools import memory_pools, pool_ranks
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.planning.memory import fullest, rank_memories
from megatron_memory.planning.plan import USABLE, Plan
from megatron_memory.planning.roofline import Cluster, step_time

RECOMPUTES = (
    RecomputeConfig(),
    RecomputeConfig(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
)
"""Nothing, or every layer."""
_MOST_SEQUENCES = 8
"""Of a microbatch."""


def best_plans(config: Config, cluster: Cluster, vocab_size: int, most: int = 5) -> list[Plan]:
    """The fastest that fit, fastest first; of layouts that differ by recompute alone the best.

    Changes the tensor-parallel, pipeline, interleaving and memory-parallel sizes, sequence
    parallelism, the microbatch and recompute. Whatever else `config` says stays, with the
    distributed optimizer and its overlaps switched on.
    """
    found: dict[tuple, Plan] = {}
    for candidate in _candidates(config, cluster):
        padded = padded_size(candidate, vocab_size)
        for recompute in RECOMPUTES:
            tried = dataclasses.replace(candidate, recompute=recompute)
            memory = fullest(rank_memories(tried, cluster.num_gpus, padded))
            if memory.total > USABLE * cluster.gpu.memory:
                continue
            time = step_time(tried, cluster, padded)
            found[_layout(tried)] = Plan(config=tried, memory=memory, time=time)
            break
    return sorted(found.values(), key=lambda each: each.time.with_overlap)[:most]


def padded_size(config: Config, vocab_size: int) -> int:
    """Rows of the embedding, as `data.tokenizers.padded_vocab_size` has it."""
    multiple = config.data.make_vocab_size_divisible_by
    multiple *= config.parallel.tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def _layout(config: Config) -> tuple:
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        config.memory.parallel_size,
        config.training.micro_batch_size,
    )


def _candidates(config: Config, cluster: Cluster) -> Iterator[Config]:
    """All layouts that pass every check."""
    world = cluster.num_gpus // config.parallel.context_parallel_size
    for tensor in _powers(min(cluster.gpus_per_node, world)):
        if world % tensor or config.model.num_query_groups % tensor:
            continue
        for pipeline in _powers(min(world // tensor, config.model.num_layers)):
            if world % (tensor * pipeline):
                continue
            copies = world // (tensor * pipeline)
            sizes = itertools.product(
                _virtual_stages(config, pipeline),
                _neighbours(config, tensor, copies),
                _microbatches(config, copies),
            )
            for stages, neighbours, sequences in sizes:
                tried = _with(config, tensor, pipeline, stages, neighbours, sequences)
                if _is_legal(tried, cluster.num_gpus):
                    yield tried


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _virtual_stages(config: Config, pipeline: int) -> list[int | None]:
    if pipeline == 1:
        return [None]
    layers = config.model.num_layers // pipeline
    return [None, *(n for n in range(2, layers + 1) if layers % n == 0)]


def _neighbours(config: Config, tensor: int, copies: int) -> list[int]:
    if not config.memory.enabled:
        return [1]
    most = min(copies, max(1, config.memory.value_dim // (tensor * MIN_COLUMNS)))
    return [n for n in _powers(most) if copies % n == 0]


def _microbatches(config: Config, copies: int) -> list[int]:
    batch = config.training.global_batch_size
    return [n for n in _powers(_MOST_SEQUENCES) if batch % (n * copies) == 0]


def _with(
    config: Config,
    tensor: int,
    pipeline: int,
    stages: int | None,
    neighbours: int,
    sequences: int,
) -> Config:
    parallel = dataclasses.replace(
        without_stage_flags(config.parallel),
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        num_virtual_stages_per_pipeline_rank=stages,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
    )
    return dataclasses.replace(
        config,
        parallel=parallel,
        memory=dataclasses.replace(config.memory, parallel_size=neighbours),
        training=dataclasses.replace(config.training, micro_batch_size=sequences, dry_run=True),
    )


def _is_legal(config: Config, world_size: int) -> bool:
    try:
        # First, because check_config looks for ways out of it, which takes a while.
        if not config.memory.replicate_pool and any(
            len(pool_ranks(config, pool)) > 1 for pool in memory_pools(config)
        ):
            return False
        check_config(config, world_size)
    except ConfigurationError:
        return False
    return True


def flags_text(before: Config, after: Config) -> str:
    """The flags that make one configuration the other."""
    words = []
    for key, flag in all_flags().items():
        old, new = (getattr(getattr(c, flag.component), flag.field.name) for c in (before, after))
        if new == old or key == "dry_run":
            continue
        if new is None:
            words.append(f"{flag_name(key)} none")
        elif isinstance(new, bool):
            words.append(flag_name(key if new else f"no_{key}"))
        else:
            words.append(f"{flag_name(key)} {new}")
    return " ".join(words)
