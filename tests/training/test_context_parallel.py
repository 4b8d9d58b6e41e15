"""Context parallelism equals one rank: the memory layer on its part of the sequences, and whole
trainings with a stand-in for Transformer Engine's attention (tests/parallel/context_attention.py).

Tolerances as in tests/parallel/runs.py.
"""

import functools
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_memory.config import Config
from megatron_memory.data.context import share_of_sequences
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.full_tensors import assemble
from tests.parallel.context_attention import use_gathered_attention
from tests.parallel.runs import assert_equal_runs, train
from tests.parallel.uneven import uneven_batches
from tests.tiny import SEQUENCE, tiny_config, tiny_model
from tests.training import tiny_runs

pytestmark = pytest.mark.distributed

CP2 = {"context_parallel_size": 2}
TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
LAYOUTS = {
    "cp2": (2, 1, CP2),
    "tp2-sp-cp2": (4, 1, CP2 | TP2_SP),
    "cp2-dp2-overlap": (4, 1, CP2 | OVERLAP),
    "cp2-dp2-m2-overlap": (4, 2, CP2 | OVERLAP),
    "cp2-dp2-m4": (4, 4, CP2),
}
"""Ranks, M, and flags. At M 2 the neighbours share their sequences, at M 4 there are both kinds."""


def train_in_contexts(config: Config) -> dict:
    """`train` with uneven loss masks, and where needed with attention for context parallelism."""
    if config.parallel.context_parallel_size > 1:
        use_gathered_attention()
    return train(config, batches=uneven_batches)


@functools.cache
def one_rank() -> dict:
    """The run on one rank, with megatron-core's own attention."""
    return run_ranks(train_in_contexts, 1, tiny_config("memory+"))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_rank(layout: str):
    world_size, neighbours, parallel = LAYOUTS[layout]
    config = tiny_config("memory+", parallel, memory={"parallel_size": neighbours})
    assert_equal_runs(run_ranks(train_in_contexts, world_size, config), one_rank())


def layer_on_share(config: Config) -> tuple[torch.Tensor, dict, dict]:
    """A memory layer on this rank's part of the sequences: its output, the gradients of its own
    parameters, and those of the table's columns."""
    use_gathered_attention()
    initialize_distributed(config, select_backend("cpu"))
    layer = tiny_model(config).memory_layers()[0]
    whole = torch.randn(2, 3, SEQUENCE, 32, generator=torch.Generator().manual_seed(3))
    group = parallel_state.get_context_parallel_group()
    share = share_of_sequences({"x": whole[0], "upstream": whole[1]}, group)
    output, bias = layer(share["x"].transpose(0, 1))
    output = (output if bias is None else output + bias).transpose(0, 1)
    (output * share["upstream"]).sum().backward()
    own = {name: p.grad for name, p in layer.named_parameters()}
    return output.detach(), own, {name: p.grad for name, p in layer.tables.named_parameters()}


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_layer_computes_its_part(variant: str, neighbours: int):
    config = tiny_config(variant, CP2, memory={"parallel_size": neighbours})
    ((whole, own, tables),) = run_ranks(layer_on_share, 1, tiny_config(variant))
    ranks = run_ranks(layer_on_share, 2, config)
    pieces = whole.chunk(4, dim=1)
    for rank, (output, _, _) in enumerate(ranks):
        wanted = torch.cat((pieces[rank], pieces[3 - rank]), dim=1)
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    for name, gradient in own.items():
        total = sum(rank_own[name] for _, rank_own, _ in ranks)
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-5)
    for name, gradient in tables.items():
        parts = [rank_tables[name] for _, _, rank_tables in ranks]
        total = torch.cat(parts, dim=1) if neighbours == 2 else sum(parts)
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-5)


def runs_in_contexts(configs: list[Config]) -> list[tiny_runs.Run]:
    use_gathered_attention()
    return tiny_runs.runs(configs)


def test_program_equals_one_rank_and_resumes_exactly(dataset: str, tmp_path: Path):
    """Data, evaluation, slot usage and checkpoints: context-parallel ranks read the same samples.

    What is read back on one rank is what two wrote, and nothing is left to train.
    """
    training = {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 4, "eval_iters": 1}
    plain = tiny_runs.tiny_config(dataset, training=training)
    saved, random = str(tmp_path / "plain"), str(tmp_path / "random")
    contexts = tiny_runs.change(plain, "parallel", context_parallel_size=2)
    contexts = tiny_runs.change(contexts, "checkpoint", save=saved)
    whole = tiny_runs.change(contexts, "checkpoint", save=None)
    whole = tiny_runs.change(whole, "memory", query_dropout=0.1, value_dropout=0.1)
    whole = tiny_runs.change(whole, "model", hidden_dropout=0.1)
    half = tiny_runs.change(tiny_runs.change(whole, "checkpoint", save=random), "training",
                            exit_interval=2)  # fmt: skip
    rest = tiny_runs.change(whole, "checkpoint", load=random)
    ranks = run_ranks(runs_in_contexts, 2, [contexts, whole, half, rest])
    loaded = tiny_runs.change(plain, "checkpoint", load=saved)
    ((alone, from_contexts),) = run_ranks(tiny_runs.runs, 1, [plain, loaded])
    for run, whole_run, first, second in ranks:
        assert run.losses == pytest.approx(alone.losses, abs=1e-5)
        assert first.losses + second.losses == whole_run.losses
        assert first.norms + second.norms == whole_run.norms
    weights = assemble([run.weights for run, *_ in ranks])
    for name, weight in assemble([from_contexts.weights]).items():
        assert torch.equal(weights[name], weight), name
