"""Compiles launches for GPUs that are not there, as Triton would on them."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.compiled.cubin import Resources, read_resources
from memory_kernels.launch import Launch

_GRID_LIMITS = (2**31 - 1, 65535, 65535)


class OfflineDriver:
    """Stands in for Triton's CUDA driver where a launch asks which GPU it is for.

    The launch then goes through Triton's own code up to the cubin, whatever the version: which
    arguments are constants, which are divisible by 16, which integers need 64 bits. A tensor of the
    meta device is at address 0, so aligned, as torch allocates tensors on a GPU.
    """

    def __init__(self) -> None:
        self.arch = 0

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by device: each architecture is one."""
        return self.arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_stream(self, device: int) -> int:
        return 0


_driver = OfflineDriver()


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel, from its cache where it is there: .asm, .metadata.

    Raises whatever Triton raises for a kernel that does not compile.
    """
    _driver.arch = arch
    triton.runtime.driver.set_active(_driver)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    return launch.kernel.warmup(**launch.arguments, grid=launch.grid, **options)


def measure(launch: Launch, arch: int) -> Resources:
    """What the launch takes of a GPU of sm_`arch`."""
    compiled = compile_launch(launch, arch)
    return read_resources(
        compiled.asm["cubin"],
        arch=arch,
        num_warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
    )


def grid_problem(launch: Launch) -> str:
    """Why CUDA would refuse the launch's grid; empty if it would not."""
    for axis, (size, limit) in enumerate(zip(launch.grid, _GRID_LIMITS, strict=False)):
        if size > limit:
            return f"{size} programs along axis {axis} of the grid, CUDA has at most {limit}"
    return ""
