"""Microbatches whose loss masks are uneven: over sequences, microbatches and ranks."""

from collections.abc import Iterator

import torch

from megatron_memory.training.step import Batch
from tests.parallel.runs import tiny_batches
from tests.tiny import SEQUENCE


def uneven_batches(data_parallel_rank: int, data_parallel_size: int) -> Iterator[Batch]:
    """`tiny_batches` with masks that depend on the tokens alone: a quarter of the microbatches is
    masked whole, and of the others most of the front."""
    for batch in tiny_batches(data_parallel_rank, data_parallel_size):
        tokens = batch["tokens"]
        front = torch.arange(SEQUENCE) < SEQUENCE // 3
        is_masked = (front & (tokens % 5 > 0)) | (tokens[0, 0] % 4 == 0)
        yield batch | {"loss_mask": (~is_masked).float()}


def joined(batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    """Every `number` microbatches as one."""
    while group := [batch for _, batch in zip(range(number), batches, strict=False)]:
        yield {name: torch.cat([batch[name] for batch in group]) for name in group[0]}
