"""Megatron's groups for tests of models in this process."""

from tests.tiny import one_rank

__all__ = ["one_rank"]
