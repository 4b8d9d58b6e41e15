"""Model, optimizer and schedule, ready for `train_step`."""

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_memory.config import Config
from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.table import ValueTable
from megatron_memory.model.gpt import MemoryGPTModel, build_model
from megatron_memory.optimizer import build_optimizer, build_scheduler
from megatron_memory.runtime import Backend


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What one rank trains with."""

    config: Config
    """The resolved configuration."""
    backend: Backend
    """Where this rank runs."""
    model: list[DistributedDataParallel]
    """The model's chunks on this rank; one without interleaved pipelines."""
    optimizer: MegatronOptimizer
    """Of all parameters; a `MemoryOptimizer` where there is a memory."""
    scheduler: OptimizerParamScheduler
    """Of learning rates and weight decay."""

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
    model = _wrap(config, build_model(config, backend, padded_vocab_size))
    optimizer = build_optimizer(config, [model])
    _connect(model, optimizer)
    return TrainingSetup(
        config=config,
        backend=backend,
        model=[model],
        optimizer=optimizer,
        scheduler=build_scheduler(config, optimizer),
    )


def unwrap(model: torch.nn.Module) -> MemoryGPTModel:
    """The model inside Megatron's wrappers."""
    while not isinstance(model, MemoryGPTModel):
        model = model.get_submodule("module")
    return model


def _wrap(config: Config, model: MemoryGPTModel) -> DistributedDataParallel:
    parallel = config.parallel
    module = Float16Module(model.config, model) if config.precision.bf16 else model
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = DistributedDataParallel(model.config, ddp_config, module)
    if parallel.overlap_grad_reduce and model.memory is not None:
        for table in model.memory.tables():
            _report_gradient(table, wrapped)
    return wrapped


def _report_gradient(table: ValueTable, ddp: DistributedDataParallel) -> None:
    """Tell DDP when a table's gradient is complete, as its hook does for parameters that autograd
    sees."""

    def report() -> None:
        for chunk in table.chunks:
            ddp.param_to_bucket_group[chunk].register_grad_ready(chunk)

    table.on_gradient_ready = report


def _connect(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    """Give Megatron's schedule the functions that it calls between microbatches and after them."""
    config = model.config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.timers = None
    if model.ddp_config.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    if model.ddp_config.overlap_param_gather:
        config.param_sync_func = model.start_param_sync


def data_parallel_group() -> torch.distributed.ProcessGroup:
    """The ranks with other tokens of the same global batch: other samples, or under context
    parallelism other parts of the same ones."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def sample_group() -> torch.distributed.ProcessGroup:
    """The ranks with other samples of the same global batch; under context parallelism several
    share theirs, and this group has one of them."""
    return parallel_state.get_data_parallel_group(with_context_parallel=False)
