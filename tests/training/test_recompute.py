"""`--recompute-modules memory`: the same training, with fewer bytes kept for backward and without
routing twice; Megatron's own recompute of whole layers and of MLPs beside it."""

import dataclasses

import pytest
import torch
from megatron.core import parallel_state

from megatron_memory.config import Config, PrecisionConfig, RecomputeConfig
from megatron_memory.memory.routing import MemoryRouter
from megatron_memory.memory.usage import SlotUsage
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.parallel.runs import train
from tests.tiny import SEQUENCE, tiny_batch, tiny_config, tiny_model
from tests.training.test_parity_one_rank import RECOMPUTES

OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "tp2-sp": (2, 1, TP2_SP),
    "dp2-overlap": (2, 1, OVERLAP),
    "dp2-m2-overlap": (2, 2, OVERLAP),
    "tp2-sp-dp2-m2": (4, 2, TP2_SP),
    "pp2-interleaved": (
        2,
        1,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    ),
}
"""Ranks, M, and flags."""
RANDOM = {"query_dropout": 0.1, "value_dropout": 0.2, "num_random_values": 2}
HIDDEN, SEQUENCES = 32, 3
TOKENS = SEQUENCE * SEQUENCES


def selective(*modules) -> RecomputeConfig:
    return RecomputeConfig(recompute_granularity="selective", recompute_modules=modules)


def train_twice(config: Config) -> tuple[dict, dict]:
    """With recompute, and from the same start without."""
    recomputed = train(config)
    parallel_state.destroy_model_parallel()
    return recomputed, train(dataclasses.replace(config, recompute=RecomputeConfig()))


def recompute_twice(
    variant: str, layout: str, *modules, bf16: bool = False, **memory
) -> list[tuple[dict, dict]]:
    world_size, neighbours, parallel = LAYOUTS[layout]
    config = tiny_config(
        variant,
        parallel,
        memory=memory | {"parallel_size": neighbours},
        recompute=selective(*modules),
        precision=PrecisionConfig(bf16=bf16),
    )
    return run_ranks(train_twice, world_size, config)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_recompute_changes_not_a_bit(layout: str):
    """The same operations run on the same numbers in the same order, dropout included."""
    # bf16 and a shadow of the table in two of them.
    bf16 = layout in ("tp2-sp", "dp2-m2-overlap")
    memory = RANDOM | {"gated": True, "fp8_values": bf16}
    for ours, theirs in recompute_twice("memory+", layout, "memory", bf16=bf16, **memory):
        assert ours["losses"] == theirs["losses"]
        assert ours["norms"] == theirs["norms"]
        _assert_gradients_close(ours, theirs, 0.0)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("variant", "layout", "modules", "memory"),
    [
        # Megatron's norm before a memory layer is then computed again, and must be back first.
        ("memory+", "dp2-m2-overlap", ("layernorm", "memory"), RANDOM),
        ("memory+", "tp2-sp", ("core_attn", "layernorm", "mlp", "memory"), RANDOM),
        ("pkm", "tp2-sp", ("memory",), {"value_dim": 24, "value_dropout": 0.2}),
    ],
)
def test_with_other_modules_and_variants(variant: str, layout: str, modules, memory: dict):
    """Megatron's own recompute adds some gradients in another order: fp32 rounding."""
    for ours, theirs in recompute_twice(variant, layout, *modules, **memory):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        _assert_gradients_close(ours, theirs, 1e-5)


def _assert_gradients_close(ours: dict, theirs: dict, tolerance: float) -> None:
    """Within the tolerance of a tensor's largest entry, on this rank's parts."""
    for our_step, their_step in zip(ours["gradients"], theirs["gradients"], strict=True):
        for name, parts in their_step.items():
            for (_, _, our_part), (_, _, part) in zip(our_step[name], parts, strict=True):
                error = (our_part - part).abs().max()
                assert error <= tolerance * part.abs().max().clamp(min=1e-3), name


def kept_bytes(config: Config) -> tuple[int, int]:
    """What a memory layer's forward pass keeps for backward, but for parameters and its input; and
    how often it sent sums to neighbours, forward and backward."""
    initialize_distributed(config, select_backend("cpu"))
    model = tiny_model(config)
    layer = model.memory_layers()[0]
    x = torch.randn(SEQUENCE, SEQUENCES, HIDDEN, requires_grad=True)
    saved: list[torch.Tensor] = []
    sent: list[int] = []
    send = torch.distributed.all_to_all_single
    torch.distributed.all_to_all_single = lambda *a, **k: sent.append(1) or send(*a, **k)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output, _ = layer(x)
    # By storage: several saved tensors may be views of one, and what is discarded has 0 bytes.
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    for tensor in (x, *model.parameters()):
        storages.pop(tensor.untyped_storage()._cdata, None)
    output.square().sum().backward()
    return sum(storages.values()), len(sent)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("variant", "neighbours", "fewer"),
    [
        # W1 x, the sums, and linear_fc2's input.
        ("memory+", 1, 3),
        # W1 x, its silu, the sums, and linear_fc2's input; what was received stays.
        ("memory+", 2, 3),
        ("pkm", 1, 1),
    ],
)
def test_fewer_bytes_are_kept(variant: str, neighbours: int, fewer: int):
    width = 64
    memory = {"parallel_size": neighbours, "value_dim": width}
    plain = tiny_config(variant, memory=memory)
    recomputed = tiny_config(variant, memory=memory, recompute=selective("memory"))
    (without, sent), *_ = run_ranks(kept_bytes, neighbours, plain)
    (kept, sent_again), *_ = run_ranks(kept_bytes, neighbours, recomputed)
    assert without - kept == fewer * TOKENS * width * 4, (without / TOKENS, kept / TOKENS)
    assert sent == sent_again == (2 if neighbours > 1 else 0)


def count_routings(config: Config) -> tuple[int, list[torch.Tensor]]:
    """Calls of routers in a forward and backward pass, and the slots counted as read."""
    calls = []
    route = MemoryRouter.forward
    MemoryRouter.forward = lambda router, x: calls.append(1) or route(router, x)
    initialize_distributed(config, select_backend("cpu"))
    model = tiny_model(config)
    usages = []
    for layer in model.memory_layers():
        layer.usage = SlotUsage(config.memory.num_values, torch.device("cpu"))
        usages.append(layer.usage.weight_sums)
    model(**tiny_batch()).sum().backward()
    return len(calls), usages


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("recompute", "routings"),
    [
        (RecomputeConfig(), 2),
        (selective("memory"), 2),
        (selective("mlp", "memory"), 2),
        (RECOMPUTES["mlp"], 4),
        (RECOMPUTES["full"], 4),
    ],
    ids=["none", "memory", "mlp memory", "mlp", "full"],
)
def test_routing_runs_once_and_is_counted_once(recompute: RecomputeConfig, routings: int):
    """In each of two memory layers; Megatron's own recompute of layers and MLPs routes again."""
    ((calls, usages),) = run_ranks(count_routings, 1, tiny_config("memory+", recompute=recompute))
    assert calls == routings
    for weight_sums in usages:
        # The weights of a head's slots add up to 1; two sequences, two heads.
        assert weight_sums.sum().item() == pytest.approx(2 * SEQUENCE * 2, rel=1e-5)
