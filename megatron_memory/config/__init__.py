"""Configuration: dataclasses, the flags generated from them, and the checks over all of them."""

from megatron_memory.config.checkpoint import CheckpointConfig
from megatron_memory.config.checks import check_config, check_layers_available
from megatron_memory.config.data import DataConfig
from megatron_memory.config.loading import (
    check_values,
    load_config,
    parse_arguments,
    save_config,
)
from megatron_memory.config.logging import LoggingConfig
from megatron_memory.config.memory import MemoryConfig
from megatron_memory.config.model import ModelConfig
from megatron_memory.config.optimizer import OptimizerSettings
from megatron_memory.config.parallel import ParallelConfig
from megatron_memory.config.precision import PrecisionConfig
from megatron_memory.config.recompute import RecomputeConfig
from megatron_memory.config.schema import Config
from megatron_memory.config.training import TrainingConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "MemoryConfig",
    "ModelConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "PrecisionConfig",
    "RecomputeConfig",
    "TrainingConfig",
    "check_config",
    "check_layers_available",
    "check_values",
    "load_config",
    "parse_arguments",
    "save_config",
]
