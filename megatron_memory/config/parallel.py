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
    """Processes that share the layers: each computes some and sends on."""
    num_layers_per_virtual_pipeline_stage: int | None = option(None, at_least=1)
    """Interleaving: layers of a stage, of which each rank then has several, in turn with the other
    ranks. Shortens the pipeline's idle time and costs more sending."""
    num_virtual_stages_per_pipeline_rank: int | None = option(None, at_least=1)
    """Interleaving, said by the stages that each rank has."""
    pipeline_model_parallel_layout: str | None = None
    """Each stage's layers, parted by |: E embedding, t layer, L loss; "Et*3|(t*4|)*2t*3L"."""
    decoder_first_pipeline_num_layers: int | None = option(None, at_least=0)
    """Layers of the first pipeline rank, where they are not as many as the others'."""
    decoder_last_pipeline_num_layers: int | None = option(None, at_least=0)
    """Layers of the last pipeline rank, where they are not as many as the others'."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when layers are split evenly."""
    account_for_loss_in_pipeline_split: bool = False
    """Count output layer and loss as a layer when layers are split evenly."""
    microbatch_group_size_per_virtual_pipeline_stage: int | None = option(None, at_least=1)
    """Interleaving: microbatches that a stage computes in a row. Without this flag:
    --pipeline-model-parallel-size."""
    overlap_p2p_communication: bool = True
    """Interleaving: send and receive between stages while the next one is computed."""
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
    rank_timeout: int = option(120, at_least=0)
    """Seconds without progress after which the run ends with exit code 4 and names the rank that
    hangs; 15 times as many for the first step and for a checkpoint. 0: it waits for ever."""
