"""Megatron's groups for tests of layers in this process."""

from tests.tiny import one_rank

__all__ = ["one_rank"]
