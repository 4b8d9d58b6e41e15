"""Fits megatron-core to the device under test before any test imports it."""

import os

import torch

from megatron_memory.runtime import prepare_megatron
from tests.devices import TEST_DEVICE

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if TEST_DEVICE == "cpu":
    # Read when a kernel is defined. Kernels then run in Triton's interpreter, where a test asks.
    os.environ["TRITON_INTERPRET"] = "1"
prepare_megatron(TEST_DEVICE)
torch.set_num_threads(1)
