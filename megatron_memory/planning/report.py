"""Figures as text, and for programs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_memory.config import Config
from megatron_memory.planning.activations import layers_of
from megatron_memory.planning.communication import rank_exchanges
from megatron_memory.planning.flops import flops_per_token
from megatron_memory.planning.groups import network_share
from megatron_memory.planning.memory import RankMemory, rank_memories
from megatron_memory.planning.parameters import count, weights
from megatron_memory.planning.plan import USABLE, Plan
from megatron_memory.planning.roofline import Cluster
from megatron_memory.planning.search import flags_text


def bytes_text(size: float) -> str:
    """In the unit that suits."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def unchecked(config: Config) -> Iterator[str]:
    """What of this configuration no real step has confirmed, or what is not counted at all."""
    parallel, model = config.parallel, config.model
    if layers_of(config) != "local on CPU":
        yield "activations of GPUs' layers are from reading the code, not measured"
    if parallel.context_parallel_size > 1:
        yield "context-parallel exchanges are Transformer Engine's, from reading"
    if model.num_experts is not None:
        yield "activations of experts are rough, and what dispatches tokens to them is not counted"
    if model.num_query_groups < parallel.tensor_model_parallel_size:
        yield (
            f"the gathering of --num-query-groups {model.num_query_groups} over "
            f"--tensor-model-parallel-size {parallel.tensor_model_parallel_size} is not counted"
        )


def figures(plan: Plan, cluster: Cluster, padded_vocab_size: int) -> dict[str, Any]:
    """Everything about a plan, for programs: bytes, seconds, numbers."""
    config, world = plan.config, cluster.num_gpus
    found = weights(config, padded_vocab_size)
    return {
        "gpu": dataclasses.asdict(cluster.gpu),
        "num_gpus": world,
        "parameters": count(config, found, on_one_rank=False),
        "flops_per_token": flops_per_token(config, padded_vocab_size),
        "memory": [
            {**dataclasses.asdict(rank), "total": rank.total}
            for rank in rank_memories(config, world, padded_vocab_size)
        ],
        "fits": plan.fits(cluster),
        "unchecked": list(unchecked(config)),
        "exchanges": {
            str(rank): [
                {
                    "purpose": exchange.purpose,
                    "group": exchange.group.name,
                    "ranks": exchange.group.size,
                    "collective": exchange.collective,
                    "size": exchange.size,
                    "sent": exchange.sent,
                    "network_share": network_share(
                        exchange.collective, exchange.group, cluster.gpus_per_node
                    ),
                }
                for exchange in exchanges
            ]
            for rank, exchanges in rank_exchanges(config, world, padded_vocab_size).items()
        },
        "time": {
            **dataclasses.asdict(plan.time),
            "without_overlap": plan.time.without_overlap,
            "with_overlap": plan.time.with_overlap,
        },
    }


def describe_plan(plan: Plan, cluster: Cluster, padded_vocab_size: int) -> Iterator[str]:
    """The lines of an estimate."""
    gpu = cluster.gpu
    yield (
        f"{cluster.num_gpus} x {gpu.name} in nodes of {cluster.gpus_per_node}: "
        f"{gpu.memory / 1e9:.0f} GB at {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{gpu.bf16_flops / 1e12:.0f} TFLOPS in bf16, {gpu.nvlink / 1e9:.0f} GB/s to the node and "
        f"{gpu.network / 1e9:.0f} GB/s to others ({gpu.source})"
    )
    yield "All of this is an estimate; nothing was measured on GPUs."
    for note in unchecked(plan.config):
        yield f"  {note}"
    parts = count(plan.config, weights(plan.config, padded_vocab_size), on_one_rank=False)
    shown = ", ".join(f"{name} {number:,}" for name, number in parts.items() if number)
    yield f"Parameters: {sum(parts.values()):,} ({shown})"
    for rank in rank_memories(plan.config, cluster.num_gpus, padded_vocab_size):
        yield from _memory(rank, plan, cluster)
    yield from _exchanges(plan.config, cluster, padded_vocab_size)
    yield from _time(plan, cluster)


def _memory(rank: RankMemory, plan: Plan, cluster: Cluster) -> Iterator[str]:
    limit = USABLE * cluster.gpu.memory
    verdict = "fits" if rank.total <= limit else "DOES NOT FIT"
    yield (
        f"Memory of a GPU of pipeline rank {rank.rank}: {bytes_text(rank.total)} of "
        f"{bytes_text(limit)} usable: {verdict}"
    )
    if rank.rank != plan.memory.rank:
        return
    states = rank.states
    parts = {
        "weights": states.weights,
        "gradients": states.gradients,
        "main weights": states.main_weights,
        "optimizer states": states.optimizer_states,
        "gradients' fp32 copies in the update": states.update,
        "values in fp8": rank.shadow,
        "counts of the slots read": rank.counters,
        **{f"activations of {part}": size for part, size in rank.activations.items()},
        "temporaries": rank.working,
        "gathered sequences": rank.gathered,
        "to and from pipeline neighbours": rank.passed,
    }
    for name, size in parts.items():
        if size:
            yield f"  {name}: {bytes_text(size)}"


def _exchanges(config: Config, cluster: Cluster, padded_vocab_size: int) -> Iterator[str]:
    ranks = rank_exchanges(config, cluster.num_gpus, padded_vocab_size)
    rank = max(ranks, key=lambda rank: sum(exchange.sent for exchange in ranks[rank]))
    yield (
        f"Sent by each GPU of pipeline rank {rank} in a step, on NVLink and on the network "
        "(a ring's mean over a node's GPUs):"
    )
    for exchange in sorted(ranks[rank], key=lambda exchange: -exchange.sent):
        group = exchange.group
        share = network_share(exchange.collective, group, cluster.gpus_per_node)
        yield (
            f"  {exchange.purpose}: {exchange.collective} over {group.size} {group.name} ranks: "
            f"{bytes_text(exchange.sent * (1 - share))}, {bytes_text(exchange.sent * share)}"
        )


def _time(plan: Plan, cluster: Cluster) -> Iterator[str]:
    time, config = plan.time, plan.config
    tokens = config.training.global_batch_size * config.model.seq_length
    yield (
        f"Step: {time.with_overlap:.3g} s with overlap, {time.without_overlap:.3g} s without; "
        f"MFU {time.mfu:.1%}; {tokens / time.with_overlap / cluster.num_gpus:,.0f} tokens/s a GPU"
    )
    yield (
        f"  matrix products {time.matrices:.3g} s (at {cluster.matrix_efficiency:.0%} of peak), "
        f"tables {time.tables:.3g}, other operators {time.others:.3g}, optimizer "
        f"{time.optimizer:.3g} (at {cluster.memory_efficiency:.0%} of the memory's bandwidth)"
    )
    yield (
        f"  NVLink {time.nvlink:.3g} s, network {time.network:.3g} (at "
        f"{cluster.link_efficiency:.0%} of the links), of which {time.hidden:.3g} can be hidden; "
        f"idle in the pipeline {time.idle:.3g}"
    )


def describe_largest(config: Config, half_keys: int) -> Iterator[str]:
    """The line about the largest memory; none for a model without."""
    if config.memory.enabled and half_keys:
        yield (
            f"Largest memory that fits in this layout: --memory-num-half-keys {half_keys}, "
            f"{half_keys**2:,} values, {half_keys**2 * config.memory.value_dim:,} parameters each"
        )
    elif config.memory.enabled:
        yield "No memory fits in this layout."


def search_figures(base: Config, plans: list[Plan]) -> list[dict[str, Any]]:
    """The best plans, for programs."""
    return [
        {
            "flags": flags_text(base, plan.config),
            "memory": plan.memory.total,
            "step": plan.time.with_overlap,
            "mfu": plan.time.mfu,
        }
        for plan in plans
    ]


def describe_search(base: Config, plans: list[Plan]) -> Iterator[str]:
    """The table of the best plans, with the flags that they add to the configuration."""
    if not plans:
        yield "Nothing fits: more GPUs, larger ones, or a smaller --memory-num-half-keys."
        return
    yield "The fastest layouts that fit:"
    yield "  TP  PP  VPP   M  batch  recompute  memory     step       MFU"
    for plan in plans:
        config = plan.config
        parallel = config.parallel
        yield (
            f"  {parallel.tensor_model_parallel_size:2}  {parallel.pipeline_model_parallel_size:2}"
            f"  {parallel.num_virtual_stages_per_pipeline_rank or 1:3}  "
            f"{config.memory.parallel_size:2}  {config.training.micro_batch_size:5}  "
            f"{config.recompute.recompute_granularity or 'none':9}  "
            f"{plan.memory.total / 2**30:5.1f} GiB  {plan.time.with_overlap:6.3g} s  "
            f"{plan.time.mfu:.1%}"
        )
    for plan in plans:
        yield f"  {flags_text(base, plan.config)}"
