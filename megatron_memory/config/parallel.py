"""How the model and the batch are spread over processes, and on which devices."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import option


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallel sizes, the data-parallel wrapper, and the processes' backend."""

    tensor_model_parallel_size: int = option(1, at_least=1)
    """Processes that share each layer's matrices and the memory table's columns."""
    pipeline_model_parallel_size: int = option(1, at_least=1)
    """Processes that share the layers. Only 1 works so far."""
    context_parallel_size: int = option(1, at_least=1)
    """Processes that share each sequence, attention included. More than 1 needs Transformer
    Engine."""
    expert_model_parallel_size: int = option(1, at_least=1)
    """Processes that share the experts of a mixture-of-experts baseline."""
    sequence_parallel: bool = False
    """Split norms, dropout and memory routing along the sequence over the tensor-parallel ranks."""
    use_distributed_optimizer: bool = False
    """Spread the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's weights while the forward pass runs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes the GPU where there is one."""
    distributed_backend: Literal["nccl", "gloo"] | None = None
    """Communication library. Without this flag: nccl on GPUs, gloo on CPUs."""
    distributed_timeout_minutes: int = option(10, at_least=1)
    """Minutes after which a collective that waits for a missing process fails."""
