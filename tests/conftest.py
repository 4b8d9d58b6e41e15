"""Fits megatron-core to the device under test before any test imports it."""

import os

import pytest
import torch

from megatron_memory.runtime import prepare_megatron
from tests.devices import TEST_DEVICE

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if TEST_DEVICE == "cpu":
    # Read when a kernel is defined. Kernels then run in Triton's interpreter, where a test asks.
    os.environ["TRITON_INTERPRET"] = "1"
prepare_megatron(TEST_DEVICE)
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those that start processes: a worker of pytest-xdist takes
    whole files, and must not be left with a long one at the end."""
    rank: dict[str, int] = {}
    for item in items:
        slow = item.get_closest_marker("slow") or item.get_closest_marker("multinode")
        own = 0 if slow else 1 if item.get_closest_marker("distributed") else 2
        rank[item.location[0]] = min(own, rank.get(item.location[0], own))
    items.sort(key=lambda item: rank[item.location[0]])
