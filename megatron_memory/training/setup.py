"""Model, optimizer and schedule, ready for `train_step`."""

import dataclasses
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_memory.config import Config
from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.model.gpt import build_model
from megatron_memory.optimizer import GuardedOptimizer, build_optimizer, build_scheduler
from megatron_memory.runtime import Backend
from megatron_memory.training.gradients import finalize_gradients
from megatron_memory.training.usage import UsageMeter
from megatron_memory.training.wrapping import wrap


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What one rank trains with."""

    config: Config
    """The resolved configuration."""
    backend: Backend
    """Where this rank runs."""
    model: list[DistributedDataParallel]
    """The model's chunks on this rank; one without interleaved pipelines."""
    optimizer: GuardedOptimizer
    """Of all parameters; a `MemoryOptimizer` where there is a memory."""
    scheduler: OptimizerParamScheduler
    """Of learning rates and weight decay."""
    usage: UsageMeter
    """Of the memory layers' slots."""

    @property
    def transformer_config(self) -> MemoryTransformerConfig:
        """Megatron's configuration, which the model shares."""
        return self.model[0].config


def build_training_setup(config: Config, backend: Backend, padded_vocab_size: int) -> TrainingSetup:
    """Build the model on this rank, wrapped for data parallelism, and its optimizer.

    Args:
        config: checked against the world size.
        backend: of this rank; Megatron's groups must exist.
        padded_vocab_size: rows of the embedding.
    """
    chunks = build_model(config, backend, padded_vocab_size)
    model = [wrap(config, chunk, is_first=i == 0) for i, chunk in enumerate(chunks)]
    optimizer = build_optimizer(config, model)
    _connect(model, optimizer)
    return TrainingSetup(
        config=config,
        backend=backend,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
        usage=UsageMeter(config, backend.device, model),
    )


def _connect(model: list[DistributedDataParallel], optimizer: GuardedOptimizer) -> None:
    """Give Megatron's schedule the functions that it calls between microbatches and after them."""
    config, ddp_config = model[0].config, model[0].ddp_config
    config.finalize_model_grads_func = finalize_gradients
    config.grad_scale_func = optimizer.scale_loss
    config.timers = None
    if ddp_config.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([chunk.no_sync for chunk in model])
    if ddp_config.overlap_param_gather:
        config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in model])


def _one_or_all(functions: list[Callable]) -> Callable | list[Callable]:
    """As Megatron's schedules take them: a list for interleaved stages only."""
    return functions[0] if len(functions) == 1 else functions


def data_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks with other tokens of the same global batch: other samples, or under context
    parallelism other parts of the same ones."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def sample_group() -> torch.distributed.ProcessGroup:
    """The ranks with other samples of the same global batch; under context parallelism several
    share theirs, and this group has one of them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=False)


class whole_weights:
    """While this is entered, every rank holds the weights after the last update.

    With `--overlap-param-gather` they otherwise arrive during the next forward pass only.
    """

    def __init__(self, setup: TrainingSetup):
        self._chunks = setup.model if setup.config.parallel.overlap_param_gather else []

    def __enter__(self) -> None:
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook()

    def __exit__(self, *exception: object) -> None:
        for chunk in self._chunks:
            chunk.enable_forward_pre_hook()
