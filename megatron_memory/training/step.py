"""One optimizer step, and the loss on held-out data."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_memory.data.context import share_of_sequences
from megatron_memory.exceptions import TrainingError
from megatron_memory.optimizer import MemoryOptimizer
from megatron_memory.optimizer.guarded import MayUpdate
from megatron_memory.training.finite import why_not_finite
from megatron_memory.training.setup import TrainingSetup, data_parallel_group
from megatron_memory.training.wrapping import tables_of

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step reports; the same on every rank."""

    loss: float
    """Mean over the tokens of the global batch that are not masked, in nats, before the update; 0
    where all are masked. What is minimised without --calculate-per-token-loss is the mean of the
    microbatches' means."""
    num_tokens: float
    """Of the global batch, those that are not masked."""
    grad_norm: float | None
    """Norm of the gradient of all parameters but the values, before clipping."""
    value_grad_norm: float | None
    """Norm of the values' gradient before clipping; None without memory."""
    learning_rate: float
    """Of all parameters but the values, in this step."""
    value_learning_rate: float | None
    """Of the values, in this step; None without memory."""
    skipped: bool
    """Whether the weights were left as they were: the loss or a gradient is not finite."""
    cause: str | None = None
    """What was not finite, and where; None if nothing."""
    is_lasting: bool = False
    """Whether that is in a weight or a state, so that every later step has it as well."""


def train_step(
    setup: TrainingSetup,
    data_iterator: Iterator[Batch],
    num_microbatches: int,
    may_update: MayUpdate = lambda is_finite: is_finite,
) -> StepResult:
    """Forward and backward over the rank's microbatches, then the update and the schedule's next
    step.

    Args:
        setup: of this rank.
        data_iterator: yields `tokens`, `labels`, `loss_mask` and `position_ids`, [micro batch, seq]
            each.
        num_microbatches: to take from it.
        may_update: is told whether the loss and the gradient norms are finite here, and answers
            alike on all ranks; on no, no rank updates.
    """
    for chunk in setup.model:
        chunk.train()
        chunk.zero_grad_buffer()
        for table in tables_of(chunk):
            table.expect_microbatches(num_microbatches)
    setup.optimizer.zero_grad()
    reports = _run_schedule(setup, data_iterator, num_microbatches, forward_only=False)
    total, num_tokens = _sum_reports(reports, setup.backend.device)
    succeeded, grad_norm, _ = setup.optimizer.step(
        lambda is_finite: may_update(is_finite and math.isfinite(total))
    )
    for chunk in setup.model:
        for table in tables_of(chunk):
            table.weights_changed()
    has_memory = isinstance(setup.optimizer, MemoryOptimizer)
    result = StepResult(
        loss=total / num_tokens if num_tokens else 0.0,
        num_tokens=num_tokens,
        grad_norm=grad_norm,
        value_grad_norm=setup.optimizer.value_grad_norm if has_memory else None,
        learning_rate=get_canonical_lr_for_logging(setup.optimizer.param_groups),
        value_learning_rate=_value_learning_rate(setup) if has_memory else None,
        skipped=not succeeded,
    )
    if not succeeded:
        figures = (result.loss, result.grad_norm, result.value_grad_norm)
        cause = why_not_finite(setup, reports, figures)
        worst, grad_norm, value_grad_norm = cause.figures
        assert worst is not None, "every step has a loss"
        return dataclasses.replace(
            result,
            loss=worst,
            grad_norm=grad_norm,
            value_grad_norm=value_grad_norm,
            cause=cause.text,
            is_lasting=cause.is_stored,
        )
    setup.scheduler.step(setup.config.training.global_batch_size)
    return result


@torch.no_grad()
def evaluate_loss(
    setup: TrainingSetup,
    data_iterator: Iterator[Batch],
    num_microbatches: int,
    num_batches: int = 1,
    before_batch: Callable[[], None] | None = None,
) -> float:
    """Mean loss in nats a token over so many batches of so many microbatches a rank, without
    dropout; every token that is not masked weighs the same.

    `before_batch` may raise, on all ranks alike, to end it.

    Raises:
        TrainingError: on every rank, where all tokens are masked.
    """
    for chunk in setup.model:
        chunk.eval()
    reports: list[Tensor] = []
    # Batch by batch: an interleaved pipeline takes only some numbers of microbatches.
    for _ in range(num_batches):
        if before_batch is not None:
            before_batch()
        reports += _run_schedule(setup, data_iterator, num_microbatches, forward_only=True)
    total, num_tokens = _sum_reports(reports, setup.backend.device)
    if num_tokens == 0:
        raise TrainingError(
            f"evaluation: the loss of every token of {num_batches} batches is masked, so that "
            "there is no mean. Look at the held-out data, use more --eval-iters, or omit "
            "--eod-mask-loss"
        )
    return total / num_tokens


def _run_schedule(
    setup: TrainingSetup, batches: Iterator[Batch], num_microbatches: int, *, forward_only: bool
) -> list[Tensor]:
    """What `_loss` reports of each microbatch, on the last pipeline stage; nothing elsewhere."""
    interleaved = len(setup.model) > 1
    forward = partial(
        _forward,
        device=setup.backend.device,
        per_token=setup.config.training.calculate_per_token_loss,
    )
    return get_forward_backward_func()(
        forward_step_func=forward,
        # Each chunk goes through the same microbatches, at its own pace.
        data_iterator=list(itertools.tee(batches, len(setup.model))) if interleaved else batches,
        model=setup.model,
        num_microbatches=num_microbatches,
        seq_length=setup.config.model.seq_length,
        micro_batch_size=setup.config.training.micro_batch_size,
        forward_only=forward_only,
    )


def _forward(
    batches: Iterator[Batch], model: torch.nn.Module, *, device: torch.device, per_token: bool
):
    """One microbatch through one chunk: the losses on the last one, else hidden states."""
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    # Of the whole sequences, so that context-parallel ranks need not ask each other.
    num_tokens = batch["loss_mask"].sum()
    context = parallel_state.get_context_parallel_group()
    batch = share_of_sequences(batch, context)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch.get("attention_mask"),
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    if per_token:
        return output, partial(_sum_of_losses, batch["loss_mask"])
    return output, partial(_mean_of_losses, batch["loss_mask"], num_tokens)


def _sum_of_losses(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For megatron-core to divide by the tokens of the global batch; and what to report."""
    total = (losses.float() * loss_mask.float()).sum()
    return total, loss_mask.sum().int(), _report(loss_mask, losses)


def _mean_of_losses(loss_mask: Tensor, num_tokens: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of the microbatch's mean, and what to report.

    Context-parallel ranks' parts add up to the mean: megatron-core's schedule multiplies by their
    number what it then averages over them.
    """
    # The schedule divides the loss in place, so the report is made of the losses.
    part = (losses.float() * loss_mask.float()).sum() / num_tokens.clamp(min=1)
    return part, _report(loss_mask, losses)


def _report(loss_mask: Tensor, losses: Tensor) -> Tensor:
    """The sum of losses and the number of tokens of this rank's part of a microbatch, in fp64."""
    mask = loss_mask.double()
    return torch.stack(((losses.detach().double() * mask).sum(), mask.sum()))


def _sum_reports(reports: list[Tensor], device: torch.device) -> tuple[float, float]:
    """Of all microbatches and ranks: the sum of losses, and the tokens; a collective call."""
    sums = torch.stack(reports).sum(dim=0) if reports else torch.zeros(2).double().to(device)
    torch.distributed.all_reduce(sums, group=data_parallel_group())
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(sums, src=last, group=pipeline)
    total, num_tokens = sums.tolist()
    return total, num_tokens


def _value_learning_rate(setup: TrainingSetup) -> float:
    _, values = setup.optimizer.chained_optimizers
    return values.param_groups[0]["lr"]
