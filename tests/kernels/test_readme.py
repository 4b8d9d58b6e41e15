"""The examples in the package's README run as they stand."""

import re
from pathlib import Path

import pytest
import torch

import memory_kernels

README = Path(memory_kernels.__file__).parent / "README.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(4))
def test_example(number: int):
    assert len(EXAMPLES) == 4
    names: dict = {}
    exec(EXAMPLES[number], names)
    leaves = [v for v in names.values() if isinstance(v, torch.Tensor) and v.is_leaf]
    learned = any(leaf.grad is not None for leaf in leaves)
    if "main_grad" in names:
        learned = bool(names["main_grad"].any())
    elif "gradients" in names:
        learned = float(names["gradients"].norm()) > 0
    assert learned


def test_every_public_call_is_described():
    assert set(re.findall(r"^\| `(\w+)\(", README.read_text(), re.MULTILINE)) == set(
        memory_kernels.__all__
    )
