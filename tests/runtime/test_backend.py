"""Which device and collectives a process takes, and megatron-core fitted to them once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_memory.exceptions import ConfigurationError
from megatron_memory.runtime import Backend, backend, megatron_cpu, prepare_megatron, select_backend

CPU = Backend(device=torch.device("cpu"), distributed="gloo")


@pytest.fixture
def gpus(monkeypatch):
    """Makes torch report a number of GPUs, and torchrun a local rank."""

    def report(number: int, local_rank: int | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(local_rank))

    return report


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("library", [None, "gloo"])
def test_cpu_where_there_is_no_gpu(gpus, device: str, library: str | None):
    gpus(0, local_rank=3)
    assert select_backend(device, library) == CPU


def test_cpu_as_asked_although_there_are_gpus(gpus):
    gpus(2)
    assert select_backend("cpu") == CPU
    assert not select_backend("cpu").is_cuda


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("library", "distributed"), [(None, "nccl"), ("nccl", "nccl"), ("gloo", "gloo")]
)
def test_each_local_rank_takes_its_gpu(gpus, device: str, library, distributed: str):
    gpus(4, local_rank=3)
    chosen = select_backend(device, library)
    assert chosen == Backend(device=torch.device("cuda", 3), distributed=distributed)
    assert chosen.is_cuda


def test_without_torchrun_the_first_gpu_is_taken(gpus):
    gpus(4)
    assert select_backend().device == torch.device("cuda", 0)


def test_a_gpu_asked_for_and_absent(gpus):
    gpus(0)
    with pytest.raises(ConfigurationError, match="^--device cuda: .* no GPU .* --device cpu"):
        select_backend("cuda")


@pytest.mark.parametrize("device, number", [("cpu", 0), ("cpu", 2), ("auto", 0)])
def test_nccl_needs_gpus(gpus, device: str, number: int):
    gpus(number)
    with pytest.raises(ConfigurationError, match="^--distributed-backend nccl .* use gloo"):
        select_backend(device, "nccl")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus(gpus, device: str):
    gpus(2, local_rank=2)
    message = "^--nproc-per-node: local rank 2 has no GPU .* this node has 2. Start at most 2"
    with pytest.raises(ConfigurationError, match=message):
        select_backend(device)


def test_preparing_again_changes_nothing(gpus):
    """tests/conftest.py has prepared this process for the CPU."""
    gpus(0)
    if backend._prepared_for != "cpu":
        pytest.skip("this process is prepared for CUDA")
    finders, cuda = list(sys.meta_path), dict(vars(torch.cuda))
    assert prepare_megatron() == prepare_megatron("cpu") == CPU
    assert sys.meta_path == finders
    assert vars(torch.cuda) == cuda


def test_another_device_later_is_refused(gpus):
    if backend._prepared_for != "cpu":
        pytest.skip("this process is prepared for CUDA")
    gpus(1)
    with pytest.raises(RuntimeError, match="prepared for cpu, not for cuda"):
        prepare_megatron("cuda")
    gpus(0)
    with pytest.raises(ConfigurationError, match="--device cuda"):
        prepare_megatron("cuda")


_TOO_LATE = """
import sys, types
import megatron_memory, megatron_memory.config
from megatron_memory.runtime import prepare_megatron

assert not [name for name in sys.modules if name.startswith("megatron.")]
sys.modules["megatron.core"] = types.ModuleType("megatron.core")
prepare_megatron("cpu")
"""


def test_megatron_imported_too_early_is_refused():
    """Importing our package is no such import: it leaves the time of preparing to its user."""
    result = subprocess.run(
        [sys.executable, "-c", _TOO_LATE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    message = "RuntimeError: megatron.core was imported before megatron_memory prepared it"
    assert result.stderr.splitlines()[-1:] == [message]


def test_constants_are_rewritten_in_nested_code():
    def megatron_like(tensor):
        def inner(device="cuda"):
            return (device, "cuda:0", "torch.cuda.FloatTensor"), tensor.is_cuda

        return inner()

    code = megatron_cpu._retarget(megatron_like.__code__)
    function = type(megatron_like)(code, globals())
    names, is_on_device = function(torch.zeros(1))
    assert names == ("cpu", "cuda:0", "torch.FloatTensor")
    assert is_on_device


def test_only_megatron_core_is_retargeted():
    """A mistake of the user's own is not hidden."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so this is no mistake")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    assert not torch.zeros(1).is_cuda
