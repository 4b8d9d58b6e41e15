"""Bytes by arithmetic against what real training steps allocate, on the CPU with local layers.

Weights, gradients, main weights and states are the tensors' own, to the byte on one rank; the
fullest rank of a sharded optimizer may have some elements of padding less. Activations are what is
alive between a microbatch's forward and backward pass, by part: formulas and measurement differ by
a few numbers for each microbatch or token (the loss and what is reported of it), far below 1% even
here. Peaks include temporaries, which are estimated by their largest.
"""

import pytest

from megatron_memory.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainingConfig,
)
from megatron_memory.planning.memory import RankMemory, rank_memories
from tests.distributed import run_ranks
from tests.planning.measured import Measured, measure_all

VOCAB, SEQUENCE = 512, 64
SHARDED, ACTIVATIONS, TOTAL = 0.002, 0.01, 0.05
"""Relative tolerances."""
MODERN = dict(
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
    num_query_groups=2,
)
OLD = dict(hidden_dropout=0.1, attention_dropout=0.1)
MEMORY = dict(layers="0", num_heads=2, top_k=8, num_half_keys=16)
BESIDE = dict(beside_mlp=True)
OPTIONS = dict(gated=True, qk_norm=True, softmax_sink=True, num_random_values=2)
OPTIONS |= dict(value_dropout=0.1, query_dropout=0.1)
FULL = dict(recompute_granularity="full", recompute_num_layers=2)
SELECTIVE = dict(
    recompute_granularity="selective", recompute_modules=("core_attn", "mlp", "layernorm")
)
PP2 = dict(pipeline_model_parallel_size=2)
VPP2 = PP2 | dict(num_layers_per_virtual_pipeline_stage=1)
REPLICAS = dict(layers="0,3", replicate_pool=True)
UNTIED = dict(untie_embeddings_and_output_weights=True)
SUMS = dict(recompute_granularity="selective", recompute_modules=("memory",))
MLPS_AND_SUMS = SUMS | dict(recompute_modules=("mlp", "memory"))
TP2 = dict(tensor_model_parallel_size=2)
TP2_SP = TP2 | dict(sequence_parallel=True)
DISTOPT = dict(use_distributed_optimizer=True)


def _config(
    *, model=MODERN, memory=None, parallel=None, bf16=False, layers=2, batch=4, **options
) -> Config:
    no_dropout = dict(hidden_dropout=0.0, attention_dropout=0.0)
    recompute = options.pop("recompute", {})
    return Config(
        model=ModelConfig(
            **dict(num_layers=layers, hidden_size=64, num_attention_heads=4, seq_length=SEQUENCE)
            | no_dropout
            | model
        ),
        memory=MemoryConfig(**MEMORY | (memory or {})),
        parallel=ParallelConfig(device="cpu", **(parallel or {})),
        precision=PrecisionConfig(bf16=bf16, **options),
        optimizer=OptimizerSettings(lr=1e-3),
        recompute=RecomputeConfig(**recompute),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=batch, train_iters=2),
    )


RUNS: dict[int, dict[str, Config]] = {
    1: {
        "fp32": _config(),
        "bf16": _config(bf16=True),
        "bf16 gradients, which the update copies": _config(
            bf16=True, accumulate_allreduce_grads_in_fp32=False, memory={"num_half_keys": 128}
        ),
        "biases, layer norm and dropout": _config(model=OLD),
        "the same in bf16": _config(model=OLD, bf16=True),
        "query and key norms": _config(model=MODERN | dict(qk_layernorm=True)),
        "dense": _config(memory={"layers": None}),
        "pkm": _config(memory={"variant": "pkm"}),
        "pkm, projected": _config(memory={"variant": "pkm", "value_dim": 32}),
        "peer": _config(memory={"variant": "peer"}),
        "all of memory+": _config(memory=OPTIONS),
        "all of memory+ in bf16": _config(memory=OPTIONS, bf16=True),
        "beside the MLP": _config(memory=BESIDE),
        "beside the MLP, selective recompute": _config(memory=BESIDE, recompute=SELECTIVE),
        "beside the MLP, recompute of both": _config(
            memory=BESIDE, recompute=MLPS_AND_SUMS, bf16=True
        ),
        "full recompute": _config(layers=4, recompute=FULL | dict(recompute_method="uniform")),
        "of some layers": _config(layers=4, recompute=FULL | dict(recompute_method="block")),
        "selective recompute": _config(recompute=SELECTIVE),
        "recompute of sums": _config(recompute=SUMS),
        "recompute of MLPs and sums": _config(recompute=MLPS_AND_SUMS),
    },
    2: {
        "TP 2": _config(parallel=TP2),
        "TP 2, SP, bf16": _config(parallel=TP2_SP, bf16=True),
        "TP 2, SP, all of memory+": _config(parallel=TP2_SP, memory=OPTIONS),
        "TP 2, SP, peer": _config(parallel=TP2_SP, memory={"variant": "peer"}),
        "DP 2 with distributed optimizer": _config(parallel=DISTOPT),
        "PP 2": _config(parallel=PP2, layers=4),
        "PP 2 in bf16, own output layer": _config(
            parallel=PP2, layers=4, model=MODERN | UNTIED, bf16=True, batch=8
        ),
        "VPP 2": _config(parallel=VPP2, layers=4, batch=8),
        "VPP 2, copies of the table, distributed optimizer": _config(
            parallel=VPP2 | DISTOPT, layers=4, batch=8, memory=REPLICAS, bf16=True
        ),
        "M 2, recompute of sums": _config(memory={"parallel_size": 2}, recompute=SUMS),
        "M 2": _config(memory={"parallel_size": 2}, bf16=True),
        "M 2, peer": _config(memory={"parallel_size": 2, "variant": "peer"}),
    },
    4: {
        "TP 2, SP, M 2, distributed optimizer": _config(
            parallel=TP2_SP | DISTOPT, memory={"parallel_size": 2}, bf16=True
        ),
    },
}


def _largest(ranks: list[Measured], part: str) -> int:
    return max(getattr(measured, part) for measured in ranks)


def _assert_states(estimate: RankMemory, ranks: list[Measured], name: str) -> None:
    states = estimate.states
    assert states.weights == _largest(ranks, "weights"), name
    assert states.gradients == _largest(ranks, "gradients"), name
    for part in ("main_weights", "optimizer_states"):
        real = _largest(ranks, part)
        assert getattr(states, part) == pytest.approx(real, rel=SHARDED), (name, part)


def _assert_activations(estimate: RankMemory, measured: Measured, name: str) -> None:
    """What is on its way between pipeline neighbours cannot be told from the stream."""
    for part in estimate.activations.keys() | measured.activations.keys():
        ours, real = estimate.activations.get(part, 0), measured.activations.get(part, 0)
        more = estimate.passed if part == "stream" else 0
        assert ours * (1 - ACTIVATIONS) <= real <= ours * (1 + ACTIVATIONS) + more, (name, part)


def _assert_total(estimate: RankMemory, measured: Measured, name: str) -> None:
    """The buffer of gathered sequences is made in the first step, and not in the second."""
    states = measured.weights + measured.gradients
    states += measured.main_weights + measured.optimizer_states
    ours = estimate.total - estimate.gathered - estimate.counters
    assert ours == pytest.approx(states + measured.peak, rel=TOTAL), name


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", RUNS)
def test_memory_is_what_real_runs_allocate(world_size: int):
    configs = RUNS[world_size]
    ranks = run_ranks(measure_all, world_size, list(configs.values()), VOCAB)
    for i, (name, config) in enumerate(configs.items()):
        estimates = rank_memories(config, world_size, VOCAB)
        share = world_size // len(estimates)
        for estimate in estimates:
            first = estimate.rank * share
            measured = [of_rank[i] for of_rank in ranks[first : first + share]]
            _assert_states(estimate, measured, f"{name}, pipeline rank {estimate.rank}")
            _assert_activations(estimate, measured[0], f"{name}, pipeline rank {estimate.rank}")
            _assert_total(estimate, measured[0], f"{name}, pipeline rank {estimate.rank}")
