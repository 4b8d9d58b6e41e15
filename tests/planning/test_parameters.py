"""Parameters and FLOPs by arithmetic against real models, on one rank and on two."""

import dataclasses

import pytest
import torch
from megatron.core import parallel_state
from torch.utils.flop_counter import FlopCounterMode

from megatron_memory.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_memory.memory import routing
from megatron_memory.memory.table import ValueTable
from megatron_memory.model.gpt import build_model
from megatron_memory.planning.flops import flops_per_token
from megatron_memory.planning.parameters import count, on_rank, size_on_rank, weights
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from memory_kernels.product_key import torch_ops
from tests.distributed import run_ranks

VOCAB, SEQUENCE = 96, 16
MODERN = dict(
    position_embedding_type="rope",
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
    num_query_groups=2,
    untie_embeddings_and_output_weights=True,
)
OLD = dict(position_embedding_type="learned_absolute", normalization="LayerNorm")
EXTRAS = dict(gated=True, qk_norm=True, softmax_sink=True)

MODELS: dict[str, tuple[dict, dict]] = {
    "dense modern": (MODERN, {"layers": None}),
    "dense old": (OLD, {"layers": None}),
    "dense qk-norm and bias": (
        MODERN | dict(qk_layernorm=True, add_qkv_bias=True),
        {"layers": None},
    ),
    "memory+": (MODERN, {"layers": "1,3"}),
    "memory+ old": (OLD, {"layers": "0,2"} | EXTRAS),
    "memory+ wide, a table each": (
        MODERN,
        {"layers": "1,3", "value_dim": 48, "share_scope": "layer"},
    ),
    "memory+ beside the MLP": (MODERN, {"layers": "1,3", "beside_mlp": True}),
    "beside the MLP, old": (OLD, {"layers": "1,3", "beside_mlp": True}),
    "pkm": (MODERN, {"layers": "2", "variant": "pkm"}),
    "pkm projected": (MODERN, {"layers": "2", "variant": "pkm", "value_dim": 16} | EXTRAS),
    "experts": (
        MODERN
        | dict(num_experts=4, moe_layer_freq=2, moe_ffn_hidden_size=48, moe_router_topk=2)
        | dict(moe_token_dispatcher_type="alltoall"),
        {"layers": None},
    ),
    "peer": (MODERN, {"layers": "1,2", "variant": "peer"}),
}


def _config(name: str, **options) -> Config:
    model, memory = MODELS[name]
    memory = memory | {"parallel_size": options.pop("parallel_size", 1)}
    return Config(
        model=ModelConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, seq_length=SEQUENCE, **model
        ),
        memory=MemoryConfig(**dict(num_heads=2, top_k=4, num_half_keys=8) | memory),
        optimizer=options.pop("optimizer", OptimizerSettings(lr=1e-3)),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=4, train_iters=2),
        **options,
    )


def _real_counts(config: Config) -> tuple[dict[str, int], list[int]]:
    """Parameters by part, and the size of each tensor."""
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    (model,) = build_model(config, backend, VOCAB)
    values = {c for t in model.modules() if isinstance(t, ValueTable) for c in t.chunks}
    routers = {p for layer in model.memory_layers() for p in layer.router.parameters()}
    counts = {"dense": 0, "router": 0, "values": 0, "experts": 0}
    for name, parameter in model.named_parameters():
        part = "values" if parameter in values else "router" if parameter in routers else "dense"
        counts["experts" if ".experts." in name else part] += parameter.numel()
    parallel_state.destroy_model_parallel()
    return counts, sorted(parameter.numel() for parameter in model.parameters())


def _all_real_counts(configs: list[Config]) -> list[tuple[dict[str, int], list[int]]]:
    return [_real_counts(config) for config in configs]


@pytest.mark.parametrize("tensor_ranks, neighbours", [(1, 1), (2, 1), (1, 2)])
def test_parameters_are_those_of_the_real_model(tensor_ranks: int, neighbours: int):
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor_ranks, sequence_parallel=tensor_ranks > 1
    )
    configs = [_config(name, parallel=parallel, parallel_size=neighbours) for name in MODELS]
    ranks = run_ranks(_all_real_counts, tensor_ranks * neighbours, configs)
    for real_on_ranks in ranks:
        for name, config, real in zip(MODELS, configs, real_on_ranks, strict=True):
            found, (counts, sizes) = weights(config, VOCAB), real
            assert count(config, found, on_one_rank=True) == counts, name
            assert sorted(size_on_rank(config, w) for w in on_rank(config, found)) == sizes, name
    for config, other in zip(configs, [_config(name) for name in MODELS], strict=True):
        whole = count(config, weights(config, VOCAB), on_one_rank=False)
        assert whole == count(other, weights(other, VOCAB), on_one_rank=True)


def _retrieval_that_torch_sees(query, keys, k: int, normalize: bool):
    """torch does not look into an operator of torch.library, but into what computes it."""
    weights, indices = torch_ops.topk(query, keys, k, normalize)
    return indices, weights


def _real_flops(configs: list[Config]) -> list[int]:
    routing.product_key_topk = _retrieval_that_torch_sees
    backend, totals = select_backend("cpu"), []
    for config in configs:
        initialize_distributed(config, backend)
        model = build_model(config, backend, VOCAB)[0].eval()
        tokens = torch.zeros(2, SEQUENCE, dtype=torch.long)
        positions = torch.arange(SEQUENCE).expand(2, -1)
        with FlopCounterMode(display=False) as counter:
            model(tokens, positions, None, labels=tokens)
        totals.append(counter.get_total_flops())
        parallel_state.destroy_model_parallel()
    return totals


def test_flops_are_those_that_torch_counts():
    """torch counts every matrix product. Two things differ, and are added up here by hand: local
    attention computes the whole square where causal attention needs half of it, and the sums over
    the rows read are no matrix products."""
    configs = [_config(name) for name in MODELS]
    for name, config, real in zip(
        MODELS, configs, run_ranks(_real_flops, 1, configs)[0], strict=True
    ):
        parts = {part: flops // 3 for part, flops in flops_per_token(config, VOCAB).items()}
        parts["attention scores and sums"] *= 2
        parts.pop("weighted sum of values", None)
        assert sum(parts.values()) * 2 * SEQUENCE == real, name


def test_values_are_not_flops_but_their_rows_are():
    small, large = (_with_half_keys(number) for number in (8, 32))
    a, b = (flops_per_token(config, VOCAB) for config in (small, large))
    assert a["weighted sum of values"] == b["weighted sum of values"] == 2 * 6 * 2 * 4 * 32
    assert b["memory key scores"] == 4 * a["memory key scores"]


def _with_half_keys(number: int) -> Config:
    config = _config("memory+")
    memory = dataclasses.replace(config.memory, num_half_keys=number)
    return dataclasses.replace(config, memory=memory)
