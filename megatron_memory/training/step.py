"""One optimizer step, and the loss on held-out data."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_memory.data.context import share_of_sequences
from megatron_memory.optimizer import MemoryOptimizer
from megatron_memory.training.setup import (
    TrainingSetup,
    data_parallel_group,
    sample_group,
    unwrap,
)

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step reports; the same on every rank."""

    loss: float
    """Mean over the global batch, in nats a token, before the update."""
    grad_norm: float | None
    """Norm of the gradient of all parameters but the values, before clipping; None if skipped."""
    value_grad_norm: float | None
    """Norm of the values' gradient before clipping; None without memory or if skipped."""
    learning_rate: float
    """Of all parameters but the values, in this step."""
    value_learning_rate: float | None
    """Of the values, in this step; None without memory."""
    skipped: bool
    """Whether Megatron left the weights as they were: under a loss scale, on infinite gradients."""


def train_step(
    setup: TrainingSetup, data_iterator: Iterator[Batch], num_microbatches: int
) -> StepResult:
    """Forward and backward over the rank's microbatches, then the update and the schedule's next
    step.

    Args:
        setup: of this rank.
        data_iterator: yields `tokens`, `labels`, `loss_mask` and `position_ids`, [micro batch, seq]
        each. num_microbatches: to take from it.
    """
    for chunk in setup.model:
        chunk.train()
        chunk.zero_grad_buffer()
    setup.optimizer.zero_grad()
    losses = _run_schedule(setup, data_iterator, num_microbatches, forward_only=False)
    succeeded, grad_norm, _ = setup.optimizer.step()
    _tell_tables(setup)
    has_memory = isinstance(setup.optimizer, MemoryOptimizer)
    result = StepResult(
        loss=_mean_loss(losses),
        grad_norm=grad_norm,
        value_grad_norm=setup.optimizer.value_grad_norm if has_memory else None,
        learning_rate=get_canonical_lr_for_logging(setup.optimizer.param_groups),
        value_learning_rate=_value_learning_rate(setup) if has_memory else None,
        skipped=not succeeded,
    )
    if succeeded:
        setup.scheduler.step(setup.config.training.global_batch_size)
    return result


def _tell_tables(setup: TrainingSetup) -> None:
    """Their fp8 shadows no longer hold the weights."""
    for chunk in setup.model:
        memory = unwrap(chunk).memory
        if memory is not None:
            memory.weights_changed()


@torch.no_grad()
def evaluate_loss(
    setup: TrainingSetup, data_iterator: Iterator[Batch], num_microbatches: int
) -> float:
    """Mean loss in nats a token over so many microbatches a rank, without dropout."""
    for chunk in setup.model:
        chunk.eval()
    losses = _run_schedule(setup, data_iterator, num_microbatches, forward_only=True)
    return _mean_loss(losses)


def _run_schedule(setup, data_iterator, num_microbatches: int, *, forward_only: bool):
    return get_forward_backward_func()(
        forward_step_func=partial(_forward, device=setup.backend.device),
        data_iterator=data_iterator,
        model=setup.model,
        num_microbatches=num_microbatches,
        seq_length=setup.config.model.seq_length,
        micro_batch_size=setup.config.training.micro_batch_size,
        forward_only=forward_only,
    )


def _forward(data_iterator: Iterator[Batch], model: torch.nn.Module, *, device: torch.device):
    batch = {
        name: tensor.to(device, non_blocking=True) for name, tensor in next(data_iterator).items()
    }
    # Of the whole sequences, so that context-parallel ranks need not ask each other.
    num_tokens = batch["loss_mask"].sum()
    batch = share_of_sequences(batch, parallel_state.get_context_parallel_group())
    losses = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return losses, partial(_masked_mean, batch["loss_mask"], num_tokens)


def _masked_mean(
    loss_mask: Tensor, num_tokens: Tensor, losses: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """This rank's part of the microbatch's mean: over context-parallel ranks they add up to it,
    and megatron-core's schedule multiplies by their number what it then averages over them."""
    loss = (losses.float() * loss_mask.float()).sum() / num_tokens.clamp(min=1)
    # Megatron's schedule divides the loss in place, so the report needs a copy.
    return loss, {"loss": loss.detach().clone()}


def _mean_loss(losses: list[dict[str, Tensor]]) -> float:
    mean = torch.stack([report["loss"] for report in losses]).mean()
    torch.distributed.all_reduce(mean, group=data_parallel_group())
    return mean.item() / sample_group().size()


def _value_learning_rate(setup: TrainingSetup) -> float:
    _, values = setup.optimizer.chained_optimizers
    return values.param_groups[0]["lr"]
