"""Whatever is parallel equals one rank: initial weights, losses, every gradient, weights after
three steps.

fp32; ranks sum in another order. The first gradients agree within 1e-5 of a tensor's largest entry,
as single layers do (tests/memory/test_golden_module.py); the later ones within 1e-4, for by then
the weights differ by rounding too. Adam divides by the root of the second moment, so that an entry
whose gradient is itself rounding noise could move by the learning rate in either direction; eps
1e-4, far above the noise (about 1e-8) and below the gradients that matter, keeps weights
comparable, to 3e-5.
"""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

from megatron_memory.config import Config, PrecisionConfig, RecomputeConfig
from megatron_memory.memory import table
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training.setup import build_training_setup, unwrap
from megatron_memory.training.step import evaluate_loss, train_step
from tests.distributed import run_ranks
from tests.full_tensors import assemble, local_gradients, local_weights
from tests.tiny import SEQUENCE, VOCAB, tiny_config

STEPS = 3
GRADIENT_TOLERANCES, WEIGHT_TOLERANCE = (1e-5, 1e-4, 1e-4), 3e-5

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


def _batches(data_parallel_rank: int, data_parallel_size: int):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (4 * STEPS + 4, 2, SEQUENCE + 1), generator=generator)
    for micro_batch in tokens[data_parallel_rank::data_parallel_size]:
        yield {
            "tokens": micro_batch[:, :-1].contiguous(),
            "labels": micro_batch[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        }


def train(config: Config) -> dict:
    """Three steps and an evaluation on this rank; what it saw."""
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, VOCAB)
    model = unwrap(setup.model[0])
    seen = {"start": local_weights(model), "gradients": [], "losses": [], "norms": []}

    def finalize(*args, **kwargs):
        finalize_model_grads(*args, **kwargs)
        _complete_gradients(setup.model[0])
        seen["gradients"].append(local_gradients(model))

    setup.transformer_config.finalize_model_grads_func = finalize
    size = parallel_state.get_data_parallel_world_size()
    batches = _batches(parallel_state.get_data_parallel_rank(), size)
    for _ in range(STEPS):
        result = train_step(setup, batches, 4 // size)
        seen["losses"].append(result.loss)
        seen["norms"].append((result.grad_norm, result.value_grad_norm))
    # The evaluation waits for the gathering of weights that may still be under way.
    seen["losses"].append(evaluate_loss(setup, batches, 4 // size))
    seen["end"] = local_weights(model)
    return seen


def train_chunked(config: Config) -> dict:
    """`train` with the value tables in chunks of 20 rows of 32 columns: 20, 20, 20 and 4 rows."""
    table.MAX_CHUNK_ELEMENTS = 20 * 32
    return train(config)


def _complete_gradients(ddp) -> None:
    """The distributed optimizer leaves each rank its shard of the sums; bring the others here."""
    if not ddp.ddp_config.use_distributed_optimizer:
        return
    for buffers, group in (
        (ddp.buffers, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        (ddp.expert_parallel_buffers, parallel_state.get_expert_data_parallel_group()),
    ):
        for buffer in buffers:
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)


_one_rank_runs: dict[str, dict] = {}


def one_rank(key: str, config: Config) -> dict:
    """The run on one rank, computed once."""
    if key not in _one_rank_runs:
        _one_rank_runs[key] = run_ranks(train, 1, config)[0]
    return _one_rank_runs[key]


def assert_equal_runs(ranks: list[dict], reference: dict) -> None:
    """Every figure of a parallel run against one rank's."""
    for seen in ranks:
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        for ours, theirs in zip(seen["norms"], reference["norms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    _assert_close(ranks, reference, "start", 0.0)
    _assert_close(ranks, reference, "end", WEIGHT_TOLERANCE)
    for step, tolerance in enumerate(GRADIENT_TOLERANCES):
        ours = assemble([seen["gradients"][step] for seen in ranks])
        theirs = assemble([reference["gradients"][step]])
        _assert_tensors_close(f"gradient {step}", ours, theirs, tolerance)


def _assert_close(ranks: list[dict], reference: dict, what: str, tolerance: float) -> None:
    ours, theirs = assemble([seen[what] for seen in ranks]), assemble([reference[what]])
    _assert_tensors_close(what, ours, theirs, tolerance)


def _assert_tensors_close(what: str, ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    # A gate's bias is one number, a sum over all tokens that nearly cancels: no smaller scale than
    # 1% of the largest entry of all.
    floor = 0.01 * max(tensor.abs().max() for tensor in theirs.values())
    for name, tensor in theirs.items():
        error = (ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=floor)
        assert error <= tolerance, f"{what}: {name} is off by {error:.2e} of its largest entry"


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
    """bf16 keeps 8 bits: activations of one rank and of two round differently, by some 1e-3 of the
    loss."""
    world_size, parallel = LAYOUTS[layout]
    precision = PrecisionConfig(bf16=True)
    reference = one_rank("bf16", tiny_config("memory+", precision=precision))
    for seen in run_ranks(train, world_size, tiny_config("memory+", parallel, precision=precision)):
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-2)
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
    _assert_close(ranks, reference, "end", WEIGHT_TOLERANCE)


def test_value_table_is_counted_once():
    seen = one_rank("memory+", tiny_config("memory+"))
    tables = [name for name in seen["start"] if name.startswith("memory.")]
    assert tables == ["memory.shared.values.weight"]
