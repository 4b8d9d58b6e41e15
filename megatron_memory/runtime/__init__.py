"""Where the model runs: one decision for CUDA + NCCL or CPU + gloo, and megatron-core fitted to
it."""

from megatron_memory.runtime.backend import Backend, prepare_megatron, select_backend

__all__ = ["Backend", "prepare_megatron", "select_backend"]
