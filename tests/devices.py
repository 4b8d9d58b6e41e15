"""The device that this run of the tests is for: the CPU, or with TEST_DEVICE=cuda a GPU.

megatron-core is fitted to one of them in a process, so a run has one. `make gpu` sets it.
"""

import os

import pytest

TEST_DEVICE = os.environ.get("TEST_DEVICE", "cpu")

needs_gpu_run = pytest.mark.skipif(
    TEST_DEVICE != "cuda", reason="a run for the CPU; make gpu runs these on a GPU"
)
"""For tests marked `gpu`."""
