"""Which implementation runs: Triton's kernels or torch's operators. Said once in the log."""

import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

CHOICES = ("auto", "triton", "torch")
_OLDEST_CAPABILITY = (8, 0)

_choice = "auto"
_said: set[str] = set()


def use_kernels(choice: str) -> None:
    """Choose for all operators of this process.

    Args:
        choice: `auto` (Triton for CUDA tensors on Ampere and newer, else torch), `triton`, `torch`.

    Raises:
        ValueError: another word, or `triton` where it cannot run.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"kernels: one of {', '.join(CHOICES)} wanted, got {choice!r}")
    if choice == "triton" and (reason := _why_no_triton()):
        raise ValueError(f"kernels: triton cannot run here: {reason}. Use auto or torch")
    _choice = choice


def kernels_in_use() -> str:
    """The choice as it was made: `auto`, `triton` or `torch`."""
    return _choice


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def uses_triton(tensor: Tensor) -> bool:
    """Whether an operator whose main operand is `tensor` runs on Triton.

    fp64 serves checks of gradients and stays on torch's operators with every choice.

    Raises:
        ValueError: `triton` is chosen and the tensor is not where Triton runs.
    """
    if _choice == "torch" or tensor.dtype == torch.float64:
        return _say(tensor, False)
    reason = _why_not_on(tensor)
    if _choice == "triton" and reason:
        raise ValueError(f"kernels: triton is chosen, but {reason}. Use auto or torch")
    return _say(tensor, not reason and (_choice == "triton" or tensor.is_cuda))


def _why_not_on(tensor: Tensor) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if is_interpreted():
        return ""
    if not tensor.is_cuda:
        return f"the tensors are on {tensor.device.type}"
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < _OLDEST_CAPABILITY:
        return f"compute capability 8.0 is the least, the GPU has {capability[0]}.{capability[1]}"
    return ""


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not is_interpreted() and not torch.cuda.is_available():
        return "torch sees no GPU"
    return ""


def _say(tensor: Tensor, triton: bool) -> bool:
    kind = "triton" if triton else "torch"
    key = f"{kind} {tensor.device.type}"
    if key not in _said and not torch.compiler.is_compiling():
        _said.add(key)
        where = "in Triton's interpreter" if triton and is_interpreted() else f"on {tensor.device}"
        logger.info("memory kernels: %s %s (use_kernels: %s)", kind, where, _choice)
    return triton
