"""megatron-core 0.16 on a machine without a GPU: torch on the CPU, collectives by gloo.

megatron-core spells its device as the constant "cuda". An import hook rewrites those constants in
megatron-core's own code objects as they load. torch, user code and other threads stay untouched,
and nothing is paid per operation; docs/architecture.md has the alternatives that were tried.
"""

import importlib.abc
import importlib.machinery
import logging
import sys
import time
import types
from collections.abc import Sequence
from typing import Any

import torch

from megatron_memory.runtime import cpu_sums

_CONSTANTS: dict[str, str] = {
    "cuda": "cpu",
    **{f"torch.cuda.{t}Tensor": f"torch.{t}Tensor" for t in ("Float", "Half", "BFloat16")},
}


def _retarget(constant: Any) -> Any:
    if isinstance(constant, str):
        return _CONSTANTS.get(constant, constant)
    if isinstance(constant, tuple):
        return tuple(_retarget(item) for item in constant)
    if isinstance(constant, types.CodeType):
        names = tuple("is_cpu" if name == "is_cuda" else name for name in constant.co_names)
        return constant.replace(co_consts=_retarget(constant.co_consts), co_names=names)
    return constant


class _RetargetingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module from its source (or its untouched .pyc) with the device constants
    rewritten."""

    def get_code(self, fullname: str) -> types.CodeType | None:
        return _retarget(super().get_code(fullname))


class _RetargetingFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _RetargetingLoader(spec.loader.name, spec.loader.path)
        return spec


class _Stream:
    """Stands in for torch.cuda.Stream: on the CPU everything is already in order."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__

    def record_event(self, *args: Any) -> "_Event":
        return _Event()

    def wait_stream(self, *args: Any) -> None:
        pass

    def wait_event(self, *args: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event:
    """Stands in for torch.cuda.Event, with the wall clock."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._seconds = time.perf_counter()

    def record(self, *args: Any) -> None:
        self._seconds = time.perf_counter()

    def wait(self, *args: Any) -> None:
        pass

    def elapsed_time(self, end: "_Event") -> float:
        return (end._seconds - self._seconds) * 1e3

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Retarget megatron-core to the CPU for the rest of this process.

    Raises:
        RuntimeError: megatron-core is already imported, with its constants unchanged.
    """
    if any(name.startswith("megatron.core") for name in sys.modules):
        raise RuntimeError("megatron.core was imported before megatron_memory prepared it")
    _install_torch_cuda_names()
    sys.meta_path.insert(0, _RetargetingFinder())
    _keep_one_generator()
    cpu_sums.install()


def _install_torch_cuda_names() -> None:
    # One function object a name: torch._dynamo rejects a function registered under two names.
    names = {
        "current_device": lambda: torch.device("cpu"),
        "synchronize": lambda *args, **kwargs: None,
        "manual_seed": lambda seed: torch.manual_seed(seed) and None,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *args, **kwargs: _Stream(),
    }
    for name, substitute in names.items():
        setattr(torch.cuda, name, substitute)
    setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)


def _keep_one_generator() -> None:
    """Let megatron-core's tracker of CUDA generators switch the states of the CPU's only one."""
    import megatron.core.tensor_parallel.random as rng

    rng._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    rng._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # fork() warns whenever dropout moves the CPU generator; here that is the intended one.
    logging.getLogger(rng.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
