"""The launches of a call, without making them: from tensors of the meta device."""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

import memory_kernels
from memory_kernels.launch import Launch

SCATTERED = (
    "order_weights",
    "narrow_candidates",
    "sort_halves",
    "best_pairs",
    "spread_gradient",
)
"""Kernels that read no rows: the place of each number that they read is found on its own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shipped:
    """One launch in one configuration."""

    name: str
    launch: Launch
    main: bool
    """Compiled by the tests too: each path through a kernel is in one of these."""
    wide: bool
    """Reads rows that begin and end at a multiple of 16 bytes, so most bytes must come in loads of
    16."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without data: a plan needs no more."""
    return torch.empty(shape, dtype=dtype, device="meta")


def shipped_by(
    call: Callable[[], Any],
    what: str,
    *,
    main: bool | Sequence[str] = False,
    wide: bool = True,
) -> Iterator[Shipped]:
    """The launches that a function of the Triton implementations makes, each once.

    Args:
        call: calls it, with tensors of the meta device.
        what: says in the launches' names which configuration this is.
        main: whether its launches are main ones; or of which kernels they are.
        wide: whether rows are multiples of 16 bytes.
    """
    found: dict[str, Launch] = {}
    for launch in _launches_of(call):
        found.setdefault(describe(launch), launch)
    numbers: dict[str, int] = {}
    for launch in found.values():
        kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
        numbers[kernel] = numbers.get(kernel, 0) + 1
        yield Shipped(
            name=f"{kernel} {what}" + (f" #{numbers[kernel]}" if numbers[kernel] > 1 else ""),
            launch=launch,
            main=main if isinstance(main, bool) else kernel in main,
            wide=wide and kernel not in SCATTERED,
        )


def _launches_of(call: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []
    with mock.patch.object(Launch, "run", lambda launch: launches.append(launch)):
        call()
    return [launch for launch in launches if math.prod(launch.grid)]


def describe(launch: Launch) -> str:
    """Equal for launches that do the same."""
    arguments = {
        name: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        for name, value in launch.arguments.items()
    }
    options = launch.num_warps, launch.num_stages
    return f"{launch.kernel.fn.__qualname__} {launch.grid} {options} {arguments}"


def kernels_without_launch(launches: list[Shipped], *, main: bool = False) -> list[str]:
    """Kernels of the package, module.function, that no launch (no main one) is of."""
    covered = {id(one.launch.kernel) for one in launches if one.main or not main}
    missing = []
    for module in pkgutil.walk_packages(memory_kernels.__path__, "memory_kernels."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_kernel = isinstance(value, KernelInterface) and name.endswith("_kernel")
            # A kernel that another module imports is listed where it is defined.
            if is_kernel and value.fn.__module__ == module.name and id(value) not in covered:
                missing.append(f"{module.name}.{name}")
    return missing
