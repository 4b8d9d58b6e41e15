"""Whatever is parallel equals one rank: initial weights, losses, every gradient, weights after
three steps; tests/parallel/runs.py says within which tolerances.
"""

import pytest

from megatron_memory.config import Config, PrecisionConfig, RecomputeConfig
from tests.distributed import run_ranks
from tests.parallel.runs import (
    WEIGHT_TOLERANCE,
    assert_close,
    assert_equal_runs,
    train,
    train_chunked,
)
from tests.tiny import tiny_config

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "dp2": (2, {}),
    "dp2-distopt": (2, {"use_distributed_optimizer": True}),
}
OVERLAPS = {
    "dp2-overlap": (2, {"overlap_grad_reduce": True}),
    "dp2-distopt-overlap": (
        2,
        {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
    ),
    "tp2-sp-dp2-distopt": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "use_distributed_optimizer": True,
        },
    ),
}
RECOMPUTES = {
    "full": RecomputeConfig(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
    "mlp": RecomputeConfig(
        recompute_granularity="selective", recompute_modules=("core_attn", "mlp", "layernorm")
    ),
}
FULL_MEMORY = {"qk_norm": True, "softmax_sink": True, "gated": True, "share_scope": "layer"}


_one_rank_runs: dict[str, dict] = {}


def one_rank(key: str, config: Config) -> dict:
    """The run on one rank, computed once."""
    if key not in _one_rank_runs:
        _one_rank_runs[key] = run_ranks(train, 1, config)[0]
    return _one_rank_runs[key]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_layout_equals_one_rank(variant: str, layout: str):
    world_size, parallel = LAYOUTS[layout]
    reference = one_rank(variant, tiny_config(variant))
    ranks = run_ranks(train, world_size, tiny_config(variant, parallel))
    assert_equal_runs(ranks, reference)


@pytest.mark.parametrize("layout", OVERLAPS)
def test_overlapped_reduction_equals_one_rank(layout: str):
    world_size, parallel = OVERLAPS[layout]
    ranks = run_ranks(train, world_size, tiny_config("memory+", parallel))
    assert_equal_runs(ranks, one_rank("memory+", tiny_config("memory+")))


@pytest.mark.parametrize("layout", ["dp2", "dp2-distopt", *OVERLAPS])
def test_tables_in_chunks_equal_one_rank_with_one_chunk(layout: str):
    """Every chunk's gradient is accumulated, reported, reduced and applied."""
    world_size, parallel = (LAYOUTS | OVERLAPS)[layout]
    ranks = run_ranks(train_chunked, world_size, tiny_config("memory+", parallel))
    assert_equal_runs(ranks, one_rank("memory+", tiny_config("memory+")))


@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_all_options_at_tp2_sp_equal_one_rank(variant: str):
    memory = FULL_MEMORY | ({} if variant == "peer" else {"value_dim": 24})
    ranks = run_ranks(train, 2, tiny_config(variant, LAYOUTS["tp2-sp"][1], memory=memory))
    assert_equal_runs(ranks, run_ranks(train, 1, tiny_config(variant, memory=memory))[0])


def test_memory_beside_mlp_at_tp2_sp_equals_one_rank():
    """With recompute of both, each its own way, against one rank without, with biases."""
    options = dict(memory={"beside_mlp": True}, model={"disable_bias_linear": False})
    recompute = RecomputeConfig(
        recompute_granularity="selective", recompute_modules=("layernorm", "mlp", "memory")
    )
    config = tiny_config("memory+", LAYOUTS["tp2-sp"][1], recompute=recompute, **options)
    ranks = run_ranks(train, 2, config)
    assert_equal_runs(ranks, run_ranks(train, 1, tiny_config("memory+", **options))[0])
    table, mlp = "memory.shared.values.weight", "decoder.layers.1.mlp.linear_fc1.weight"
    assert {table, mlp, "decoder.layers.1.mlp.memory.router.keys"} <= ranks[0]["start"].keys()


@pytest.mark.parametrize("layout", ["dp2", "tp2-sp"])
@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_recompute_changes_nothing(recompute: str, layout: str):
    world_size, parallel = LAYOUTS[layout]
    parallel = parallel | {"overlap_grad_reduce": layout == "dp2"}
    plain = run_ranks(train, world_size, tiny_config("memory+", parallel))
    config = tiny_config("memory+", parallel, recompute=RECOMPUTES[recompute])
    for ours, theirs in zip(run_ranks(train, world_size, config), plain, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-6)
        for our_norms, their_norms in zip(ours["norms"], theirs["norms"], strict=True):
            assert our_norms == pytest.approx(their_norms, rel=1e-6)


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2-distopt"])
def test_bf16_with_fp32_main_weights_follows_one_rank(layout: str):
    """bf16 keeps 8 bits: activations of one rank and of two round differently. The losses drift
    apart with the weights, by 1e-3 before the first update and 1.1e-2 after the third."""
    world_size, parallel = LAYOUTS[layout]
    precision = PrecisionConfig(bf16=True)
    reference = one_rank("bf16", tiny_config("memory+", precision=precision))
    for seen in run_ranks(train, world_size, tiny_config("memory+", parallel, precision=precision)):
        assert seen["losses"] == pytest.approx(reference["losses"], abs=2e-2)
        assert seen["losses"][0] == pytest.approx(reference["losses"][0], abs=3e-3)
        assert seen["norms"][0] == pytest.approx(reference["norms"][0], rel=3e-2)


@pytest.mark.parametrize("layout", ["tp2-sp", "dp2-distopt"])
@pytest.mark.parametrize("num_experts", [None, 2], ids=["dense", "moe"])
def test_baseline_without_memory_equals_one_rank(num_experts: int | None, layout: str):
    world_size, parallel = LAYOUTS[layout]
    model = {"num_experts": num_experts, "untie_embeddings_and_output_weights": True}
    config = tiny_config(None, parallel, model=model)
    reference = one_rank(f"baseline {num_experts}", tiny_config(None, model=model))
    ranks = run_ranks(train, world_size, config)
    for seen in ranks:
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    assert_close(ranks, reference, "end", WEIGHT_TOLERANCE)


def test_value_table_is_counted_once():
    seen = one_rank("memory+", tiny_config("memory+"))
    tables = [name for name in seen["start"] if name.startswith("memory.")]
    assert tables == ["memory.shared.values.weight"]
