"""Which implementation computes the memory layers: the one place that applies the choice."""

import torch

from megatron_memory.exceptions import ConfigurationError
from megatron_memory.runtime.backend import Backend
from memory_kernels.choice import is_interpreted, kernels_in_use, use_kernels, uses_triton


def choose_kernels(choice: str, backend: Backend) -> str:
    """Let the memory layers of this process run on `choice`.

    Args:
        choice: `--memory-kernels`: auto, triton or torch.
        backend: of this rank.

    Returns:
        what they run on, for the log.

    Raises:
        ConfigurationError: Triton is chosen and cannot run here.
    """
    before = kernels_in_use()
    try:
        use_kernels(choice)
        runs_triton = uses_triton(torch.empty(0, device=backend.device))
    except ValueError as error:
        use_kernels(before)
        reason = str(error).removeprefix("kernels: ")
        raise ConfigurationError(f"--memory-kernels {choice}: {reason}.") from error
    return _in_words(choice, runs_triton, backend)


def _in_words(choice: str, runs_triton: bool, backend: Backend) -> str:
    where = f"on {'CUDA' if backend.is_cuda else 'the CPU'}"
    if not runs_triton:
        return f"memory kernels: torch's operators {where} (--memory-kernels {choice})"
    import triton

    if is_interpreted():
        where = "in its interpreter, which is for tests: far slower than torch"
    return f"memory kernels: Triton {triton.__version__} {where} (--memory-kernels {choice})"
