"""Our program's run of a golden whole model: the reference's weights, tokens and settings."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_memory.config import CheckpointConfig, Config
from megatron_memory.model.full_weights import load_full_weights
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training.checkpoint.saver import CheckpointSaver
from megatron_memory.training.checkpoint.state import Position
from megatron_memory.training.setup import TrainingSetup, build_training_setup
from megatron_memory.training.step import train_step
from megatron_memory.training.wrapping import unwrap
from tests.golden_lingua import case_config, full_weights, load_case

_MICRO_BATCH = 2


def train_like_reference(name: str, parallel: dict, device: str = "cpu") -> list[dict]:
    """Every step's figures, under the trajectory's names; on each rank."""
    return _train(name, case_config(name, **parallel), device)[1]


def save_like_reference(name: str, save: Path) -> None:
    """Train on one rank, and save a checkpoint."""
    config = case_config(name)
    config = dataclasses.replace(config, checkpoint=CheckpointConfig(save=str(save)))
    setup, steps = _train(name, config, "cpu")
    CheckpointSaver(setup, vocab_size=258).save(Position(iteration=len(steps)))


def _train(name: str, config: Config, device: str) -> tuple[TrainingSetup, list[dict]]:
    _, tensors, trajectory = load_case(name)
    backend = select_backend(device)
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, padded_vocab_size=258)
    load_full_weights(unwrap(setup.model[0]), full_weights(name, tensors))
    setup.optimizer.reload_model_params()
    batches = _batches(tensors["train.tokens"])
    num_microbatches = config.training.global_batch_size // _MICRO_BATCH
    steps = []
    for _ in trajectory:
        result = train_step(setup, batches, num_microbatches)
        steps.append(
            {
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "value_grad_norm": result.value_grad_norm,
                "lrs": [result.learning_rate, result.value_learning_rate],
            }
        )
    return setup, steps


def _batches(tokens: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    """tokens [steps, batch, seq + 1] in micro batches of two."""
    for micro_batch in tokens.flatten(0, 1).split(_MICRO_BATCH):
        inputs, labels = micro_batch[:, :-1].contiguous(), micro_batch[:, 1:].contiguous()
        yield {
            "tokens": inputs,
            "labels": labels,
            "loss_mask": torch.ones(inputs.shape),
            "position_ids": torch.arange(inputs.shape[1]).expand_as(inputs),
        }
