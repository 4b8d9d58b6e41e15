"""The whole configuration: one component for each part of the program."""

import dataclasses
from dataclasses import dataclass, field

from megatron_memory.config.checkpoint import CheckpointConfig
from megatron_memory.config.data import DataConfig
from megatron_memory.config.logging import LoggingConfig
from megatron_memory.config.memory import MemoryConfig
from megatron_memory.config.model import ModelConfig
from megatron_memory.config.optimizer import OptimizerSettings
from megatron_memory.config.option import fill_derived
from megatron_memory.config.parallel import ParallelConfig
from megatron_memory.config.pipeline import Stage, pipeline_stages
from megatron_memory.config.precision import PrecisionConfig
from megatron_memory.config.recompute import RecomputeConfig
from megatron_memory.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that flags and the configuration file decide.

    Derived fields hold their values: those within one component since its construction, those
    that span components (`memory.value_dim`, `memory.key_dim`, `memory.value_min_lr`,
    `optimizer.lr_decay_iters`) since the construction of this object. What depends on the machine
    (`parallel.device`, `parallel.distributed_backend`, `model.transformer_impl`) stays as it was
    given, so that a saved configuration works on another machine.
    """

    model: ModelConfig
    """Decoder"""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Memory layers"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Parallelism and devices"""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Precision"""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    """Activation recompute"""
    optimizer: OptimizerSettings
    """Optimizer and schedule"""
    training: TrainingConfig
    """Training loop"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints"""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Logging"""
    data: DataConfig = field(default_factory=DataConfig)
    """Data and tokenizer"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory", _derive_memory(self.memory, self.model, self.optimizer))
        # A copy, so that one OptimizerSettings can be used with trainings of several lengths.
        optimizer = dataclasses.replace(self.optimizer)
        fill_derived(optimizer, lr_decay_iters=self.training.train_iters)
        object.__setattr__(self, "optimizer", optimizer)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The pipeline's stages in the order of the model; see `pipeline_stages`."""
        return pipeline_stages(self.model, self.parallel)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that together hold one copy of the model."""
        return (
            self.parallel.tensor_model_parallel_size
            * self.parallel.pipeline_model_parallel_size
            * self.parallel.context_parallel_size
        )

    @property
    def expert_group_size(self) -> int:
        """Data-parallel neighbours that share the experts, or the memory's columns: Megatron's
        groups serve either, which are never in one model."""
        if self.memory.enabled:
            return self.memory.parallel_size
        return self.parallel.expert_model_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a run of `world_size` ranks."""
        return world_size // self.model_parallel_size

    def divides_batch(self, world_size: int) -> bool:
        """Whether every rank gets equally many whole microbatches."""
        copies = self.data_parallel_size(world_size)
        sequences = self.training.micro_batch_size * copies
        return bool(sequences) and self.training.global_batch_size % sequences == 0

    def num_microbatches(self, world_size: int) -> int:
        """Microbatches that each rank computes for one optimizer step."""
        sequences = self.training.micro_batch_size * self.data_parallel_size(world_size)
        return self.training.global_batch_size // sequences


def _derive_memory(
    memory: MemoryConfig, model: ModelConfig, optimizer: OptimizerSettings
) -> MemoryConfig:
    # A copy, so that one MemoryConfig can be used with models of several widths.
    memory = dataclasses.replace(memory)
    ratio = min(1.0, optimizer.min_lr / optimizer.lr) if optimizer.lr > 0 else 0.0
    fill_derived(memory, value_dim=model.hidden_size, value_min_lr=memory.value_lr * ratio)
    fill_derived(memory, key_dim=memory.value_dim // 2)
    return memory
