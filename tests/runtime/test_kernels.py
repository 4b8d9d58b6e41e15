"""What computes the memory layers: chosen once, refused with the flag and the fix."""

import pytest
import torch

from megatron_memory.exceptions import ConfigurationError
from megatron_memory.runtime import Backend
from megatron_memory.runtime.kernels import choose_kernels
from memory_kernels.choice import kernels_in_use, use_kernels, uses_triton

CPU = Backend(device=torch.device("cpu"), distributed="gloo")


@pytest.fixture(autouse=True)
def _restore():
    before = kernels_in_use()
    yield
    use_kernels(before)


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_on_the_cpu_it_is_torch(choice: str):
    said = choose_kernels(choice, CPU)
    assert said == f"memory kernels: torch's operators on the CPU (--memory-kernels {choice})"
    assert kernels_in_use() == choice
    assert not uses_triton(torch.empty(1))


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    before = kernels_in_use()
    with pytest.raises(ConfigurationError, match="--memory-kernels triton: .*Use auto or torch"):
        choose_kernels("triton", CPU)
    assert kernels_in_use() == before


def test_triton_runs_in_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "in its interpreter" in choose_kernels("triton", CPU)
    assert uses_triton(torch.empty(1))
