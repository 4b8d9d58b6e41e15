"""How long a step would take at least: products at the tensor cores' rate, tables and states at the
memory's, exchanges at the links'. An estimate, not a measurement.

Left out: launches, selection of slots, waiting of one rank for another, congestion.
"""

import dataclasses
import math
from collections.abc import Sequence

from megatron_memory.config import Config
from megatron_memory.config.pipeline import Stage, num_chunks
from megatron_memory.config.pools import memory_layers
from megatron_memory.planning.activations import Sizes, chunk_activations, layers_of
from megatron_memory.planning.communication import Exchange, rank_exchanges
from megatron_memory.planning.flops import (
    ROUTING,
    flops_per_token,
    forward_products,
    output_products,
)
from megatron_memory.planning.groups import network_share
from megatron_memory.planning.hardware import Gpu
from megatron_memory.planning.schedule import bubble
from megatron_memory.planning.stages import by_rank, stage_weights
from megatron_memory.planning.states import buffers, element, gradient_element

_HIDDEN = ("gradients", "weights", "values' gradients", "values' weights", "between stages")
"""What is under way while ranks compute, where overlap is on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs, their nodes, and what part of their peaks is reached."""

    gpu: Gpu
    num_gpus: int
    gpus_per_node: int = 8
    matrix_efficiency: float = 0.65
    """Part of the tensor cores' peak that matrix products reach. An assumption."""
    memory_efficiency: float = 0.8
    """Part of the memory's bandwidth that tables, states and activations get. An assumption."""
    link_efficiency: float = 0.8
    """Part of the links' bandwidth that collectives reach. An assumption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step on the slowest pipeline rank, by what takes them."""

    matrices: float
    """Matrix products, recompute included."""
    tables: float
    """Rows of values read, and gradients added to them."""
    others: float
    """Reading and writing of activations by everything else."""
    optimizer: float
    nvlink: float
    """All that is sent within a node."""
    network: float
    """All that is sent between nodes."""
    hidden: float
    """Of these two, what may be under way while the rank computes."""
    idle: float
    """Waiting for other stages of the pipeline."""
    mfu: float = 0.0
    """FLOPs of the model by all that the GPUs could have done meanwhile, with overlap."""

    @property
    def computing(self) -> float:
        """Without exchanges."""
        return self.matrices + self.tables + self.others

    @property
    def without_overlap(self) -> float:
        """One thing after the other."""
        return self.computing + self.optimizer + self.nvlink + self.network + self.idle

    @property
    def with_overlap(self) -> float:
        """What can be hidden behind the computation is, as far as that lasts."""
        return self.without_overlap - min(self.hidden, self.computing)


def step_time(config: Config, cluster: Cluster, padded_vocab_size: int) -> StepTime:
    """Of one optimizer step. `config` is checked for so many GPUs."""
    exchanges = rank_exchanges(config, cluster.num_gpus, padded_vocab_size)
    ranks = [
        _rank_time(config, cluster, stages, exchanges[rank], padded_vocab_size)
        for rank, stages in by_rank(config).items()
    ]
    slowest = max(ranks, key=lambda time: time.with_overlap)
    tokens = config.training.global_batch_size * config.model.seq_length
    flops = sum(flops_per_token(config, padded_vocab_size).values()) * tokens
    possible = cluster.num_gpus * _peak(config, cluster.gpu) * slowest.with_overlap
    return dataclasses.replace(slowest, mfu=flops / possible)


def _peak(config: Config, gpu: Gpu) -> float:
    return gpu.bf16_flops if config.precision.bf16 else gpu.fp32_flops


def _rank_time(
    config: Config,
    cluster: Cluster,
    stages: Sequence[Stage],
    exchanges: list[Exchange],
    padded_vocab_size: int,
) -> StepTime:
    microbatches = config.num_microbatches(cluster.num_gpus)
    rate = cluster.matrix_efficiency * _peak(config, cluster.gpu)
    bandwidth = cluster.memory_efficiency * cluster.gpu.bandwidth
    products = sum(_stage_flops(config, stage, padded_vocab_size) for stage in stages)
    matrices = products * microbatches / rate
    tables = sum(_table_bytes(config, stage) for stage in stages) * microbatches / bandwidth
    others = sum(_activation_traffic(config, stage) for stage in stages) * microbatches / bandwidth
    times = [link_times(exchange, cluster) for exchange in exchanges]
    nvlink, network = (sum(time[i] for time in times) for i in (0, 1))
    hidden = sum(
        sum(time)
        for exchange, time in zip(exchanges, times, strict=True)
        if exchange.purpose in _HIDDEN and _overlaps(config, exchange)
    )
    num_ranks = config.parallel.pipeline_model_parallel_size
    exposed = nvlink + network - hidden
    idle = bubble(num_ranks, num_chunks(config.stages), microbatches)
    return StepTime(
        matrices=matrices,
        tables=tables,
        others=others,
        optimizer=_optimizer_bytes(config, stages, cluster, padded_vocab_size) / bandwidth,
        nvlink=nvlink,
        network=network,
        hidden=hidden,
        idle=idle * (matrices + tables + others + exposed),
    )


def link_times(exchange: Exchange, cluster: Cluster) -> tuple[float, float]:
    """Seconds on NVLink and on the network."""
    share = network_share(exchange.collective, exchange.group, cluster.gpus_per_node)
    gpu, efficiency = cluster.gpu, cluster.link_efficiency
    return (
        exchange.sent * (1 - share) / (gpu.nvlink * efficiency),
        exchange.sent * share / (gpu.network * efficiency),
    )


def _overlaps(config: Config, exchange: Exchange) -> bool:
    parallel = config.parallel
    if exchange.purpose == "between stages":
        return num_chunks(config.stages) > 1 and parallel.overlap_p2p_communication
    if exchange.purpose.endswith("weights"):
        return parallel.overlap_param_gather
    return parallel.overlap_grad_reduce


def _stage_flops(config: Config, stage: Stage, padded_vocab_size: int) -> float:
    """Of one microbatch on one rank, forward, backward and recompute."""
    sizes, ranks = (
        Sizes(config=config, layers=layers_of(config)),
        (config.parallel.tensor_model_parallel_size),
    )
    tokens, total = sizes.tokens, 0.0
    for name, number in forward_products(config, stage.layers).items():
        if name == "weighted sum of values":
            continue  # bound by the memory: see _table_bytes
        share = 1 if name in ROUTING and not config.parallel.sequence_parallel else 1 / ranks
        total += (3 + _again(config, name, stage)) * number * share
    if stage.has_loss:
        total += 3 * output_products(config, padded_vocab_size) / ranks
    return 2 * tokens * total


def _again(config: Config, name: str, stage: Stage) -> float:
    """How often recompute repeats the forward pass of something."""
    recompute = config.recompute
    if recompute.recompute_granularity == "full":
        number = recompute.recompute_num_layers or 1
        every = recompute.recompute_method == "uniform" or not stage.layers
        return 1.0 if every else min(1.0, number / len(stage.layers))
    if recompute.recompute_granularity is None:
        return 0.0
    modules = recompute.recompute_modules or ("core_attn",)
    routes_again = "mlp" in modules and "memory" not in modules
    covered = {
        "attention scores and sums": "core_attn" in modules,
        "MLP": "mlp" in modules,
        "memory query projection": routes_again,
        "memory key scores": routes_again,
        "memory gate and output": "mlp" in modules or "memory" in modules,
    }
    return float(covered.get(name, False))


def _table_bytes(config: Config, stage: Stage) -> float:
    """Of one microbatch: rows read forward and backward, and gradients of distinct rows added."""
    memory = config.memory
    readers = len(set(stage.layers) & set(memory_layers(config)))
    if not readers:
        return 0.0
    sizes = Sizes(config=config, layers=layers_of(config))
    rows = memory.num_heads * (memory.top_k + memory.num_random_values)
    reads = sizes.tokens * memory.parallel_size * rows
    columns = memory.value_dim // (sizes.ranks * memory.parallel_size)
    value = 1 if memory.fp8_values else element(config)
    # As if all slots were equally likely: the most rows that so many reads touch.
    distinct = memory.num_values * -math.expm1(-reads / memory.num_values)
    again = int(_again(config, "memory gate and output", stage))
    read = (2 + again) * reads * columns * value
    written = 2 * distinct * columns * gradient_element(config)
    return readers * (read + written) * (2 if memory.variant == "peer" else 1)


def _activation_traffic(config: Config, stage: Stage) -> float:
    """What is kept is written and read once, and so are the gradients."""
    plain = dataclasses.replace(config, recompute=type(config.recompute)())
    sizes = Sizes(config=plain, layers=layers_of(config))
    return 4.0 * sum(chunk_activations(sizes, stage.layers).values())


def _optimizer_bytes(
    config: Config, stages: Sequence[Stage], cluster: Cluster, padded_vocab_size: int
) -> float:
    """Gradients zeroed, their norm taken, clipped; main weights and moments updated; weights
    written."""
    gradient, total = gradient_element(config), 0.0
    for stage in stages:
        for buffer in buffers(
            config, stage_weights(config, stage, padded_vocab_size), cluster.num_gpus
        ):
            shards = buffer.ranks if config.parallel.use_distributed_optimizer else 1
            kept = buffer.padded / shards
            total += buffer.padded * gradient
            total += kept * (4 * gradient + 2 * (4 + 8) + element(config))
    return total
