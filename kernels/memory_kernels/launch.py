"""A kernel launch as a value: run it, or compile it for another GPU without having one.

The functions that plan launches look at shapes and dtypes only, so that the offline checks compile
exactly what ships, from tensors of the meta device.
"""

import contextlib
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a Triton kernel."""

    kernel: Any
    """A function decorated with triton.jit."""
    grid: tuple[int, ...]
    """Programs along each axis."""
    arguments: dict[str, Any]
    """By parameter name: tensors, numbers, None, and the values of constexpr parameters."""
    num_warps: int = 4
    num_stages: int = 1

    def run(self) -> None:
        """Launch on the device of the first tensor; an empty grid launches nothing."""
        if math.prod(self.grid) == 0:
            return
        tensor = next(a for a in self.arguments.values() if isinstance(a, Tensor))
        device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
        with device:
            self.kernel[self.grid](
                **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
            )


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more; 1 for n below 1."""
    return 1 << max(n - 1, 0).bit_length()
