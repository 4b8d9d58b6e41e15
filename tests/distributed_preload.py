"""Imported once by the process that test ranks are forked from."""

from megatron_memory.runtime import prepare_megatron

prepare_megatron("cpu")

import megatron_memory.training.step  # noqa: E402, F401
