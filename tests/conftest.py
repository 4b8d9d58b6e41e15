"""Fits megatron-core to this machine before any test imports it, and keeps torch to itself."""

import os

import torch

from megatron_memory.runtime import prepare_megatron

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
prepare_megatron()
torch.set_num_threads(1)
