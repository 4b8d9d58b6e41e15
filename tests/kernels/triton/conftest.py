"""Every test in this folder runs the Triton kernels: in the interpreter, or on the GPU by
`make gpu`."""

import pytest

from memory_kernels import choice


@pytest.fixture(autouse=True)
def triton_kernels():
    before = choice.kernels_in_use()
    choice.use_kernels("triton")
    yield
    choice.use_kernels(before)
