"""A chunk of the model in Megatron's wrappers, and out of them."""

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from megatron_memory.config import Config
from megatron_memory.memory.table import ValueTable
from megatron_memory.model.gpt import MemoryGPTModel


def unwrap(model: torch.nn.Module) -> MemoryGPTModel:
    """The model inside Megatron's wrappers."""
    while not isinstance(model, MemoryGPTModel):
        model = model.get_submodule("module")
    return model


def wrap(config: Config, model: MemoryGPTModel, *, is_first: bool) -> DistributedDataParallel:
    """Megatron's wrappers around a chunk; `is_first` of its rank."""
    parallel = config.parallel
    module = Float16Module(model.config, model) if config.precision.bf16 else model
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    # As in Megatron-LM: what later chunks send overlaps with computation without buckets.
    wrapped = DistributedDataParallel(
        model.config, ddp_config, module, disable_bucketing=not is_first
    )
    if parallel.overlap_grad_reduce:
        for table in tables_of(wrapped):
            _report_gradient(table, wrapped)
    return wrapped


def tables_of(chunk: torch.nn.Module) -> list[ValueTable]:
    """The value tables that a chunk, in its wrappers or not, holds."""
    memory = unwrap(chunk).memory
    return [] if memory is None else memory.tables()


def _report_gradient(table: ValueTable, ddp: DistributedDataParallel) -> None:
    """Tell DDP when a table's gradient is complete, as its hook does for parameters that autograd
    sees."""

    def report() -> None:
        for chunk in table.chunks:
            ddp.param_to_bucket_group[chunk].register_grad_ready(chunk)

    table.on_gradient_ready = report
