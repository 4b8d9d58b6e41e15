"""`--calculate-per-token-loss`: every token weighs the same, however unevenly the loss masks are
spread over microbatches and ranks, and whatever the layout. What is reported weighs them so without
the flag, too.

The reference is one rank that takes each global batch as one microbatch, without the flag: its loss
is the mean over all tokens. Tolerances as in tests/parallel/runs.py.
"""

import dataclasses
import functools

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.exceptions import TrainingError
from tests.distributed import run_ranks
from tests.full_tensors import assemble
from tests.parallel.context_attention import use_gathered_attention
from tests.parallel.runs import STEPS, assert_equal_runs, train
from tests.parallel.uneven import joined, uneven_batches
from tests.tiny import tiny_config

pytestmark = pytest.mark.distributed

OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one rank": (1, 1, 8, {}),
    "dp2-overlap": (2, 1, 8, OVERLAP),
    "cp2": (2, 1, 8, {"context_parallel_size": 2}),
    "dp2-m2": (2, 2, 8, {}),
    "pp2": (2, 1, 6, PP2),
    "pp2-cp2": (4, 1, 6, PP2 | {"context_parallel_size": 2}),
    "pp2-dp2-m2-overlap": (4, 2, 12, PP2 | OVERLAP),
}
"""Ranks, M, sequences of a global batch, and flags; with pipelines three microbatches a step, which
two stages do not divide."""


def config_of(batch: int, neighbours: int, parallel: dict, **training) -> Config:
    memory = {"parallel_size": neighbours, "share_scope": "layer"}
    config = tiny_config("memory+", parallel, memory=memory)
    training |= {"global_batch_size": batch}
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def train_uneven(config: Config, start: dict[str, torch.Tensor]) -> dict:
    if config.parallel.context_parallel_size > 1:
        use_gathered_attention()
    return train(config, start, uneven_batches)


def train_joined(config: Config) -> dict:
    number = config.training.micro_batch_size // 2
    return train(config, None, lambda *ranks: joined(uneven_batches(*ranks), number))


@functools.cache
def one_rank(batch: int, lr: float | None = None) -> dict:
    """All of a global batch in one microbatch; computed once."""
    config = config_of(batch, 1, {}, micro_batch_size=batch)
    return run_ranks(train_joined, 1, config if lr is None else still(config))[0]


def still(config: Config) -> Config:
    """Without updates."""
    replace = dataclasses.replace
    optimizer = replace(config.optimizer, lr=0.0, min_lr=0.0)
    return replace(config, optimizer=optimizer, memory=replace(config.memory, value_lr=0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_all_tokens_at_once(layout: str):
    world_size, neighbours, batch, parallel = LAYOUTS[layout]
    reference = one_rank(batch)
    config = config_of(batch, neighbours, parallel, calculate_per_token_loss=True)
    ranks = run_ranks(train_uneven, world_size, config, assemble([reference["start"]]))
    assert_equal_runs(ranks, reference)


INTERLEAVED = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}


@pytest.mark.parametrize("layout", ["one rank", "dp2-overlap", "pp2-cp2", "pp2-interleaved"])
def test_reported_losses_are_of_all_tokens_without_the_flag(layout: str):
    """With a learning rate of 0 the weights stay, so that every step and the evaluation can be
    compared. The microbatches' means, which are what is minimised, have another mean."""
    layouts = LAYOUTS | {"pp2-interleaved": (2, 1, 8, INTERLEAVED)}
    world_size, neighbours, batch, parallel = layouts[layout]
    reference = one_rank(batch, lr=0.0)
    config = still(config_of(batch, neighbours, parallel))
    ranks = run_ranks(train_uneven, world_size, config, assemble([reference["start"]]))
    for seen in ranks:
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-6)


def test_an_evaluation_without_a_token_is_refused():
    for error in run_ranks(evaluate_masked, 2, config_of(8, 1, {})):
        assert "every token of 1 batches is masked" in error and "--eod-mask-loss" in error


def evaluate_masked(config: Config) -> str:
    def masked(*ranks: int):
        return (b | {"loss_mask": b["loss_mask"] * 0} for b in uneven_batches(*ranks))

    with pytest.raises(TrainingError) as raised:
        train(config, None, masked)
    return str(raised.value)


def test_masks_are_uneven():
    """What the tests above rest on: within a global batch some microbatches have no tokens, others
    more or fewer."""
    counts = torch.stack([batch["loss_mask"].sum() for batch in uneven_batches(0, 1)])
    steps = counts[: 4 * STEPS].view(STEPS, 4)
    assert (steps == 0).any() and (steps.sum(dim=1) > 0).all()
    assert all(len(step.unique()) > 1 for step in steps)
