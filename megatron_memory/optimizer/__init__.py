"""Megatron's optimizers, with settings and a gradient norm of their own for the memory values."""

from megatron_memory.optimizer.build import build_optimizer, build_scheduler
from megatron_memory.optimizer.guarded import GuardedOptimizer
from megatron_memory.optimizer.memory_optimizer import MemoryOptimizer

__all__ = ["GuardedOptimizer", "MemoryOptimizer", "build_optimizer", "build_scheduler"]
