"""What kernels take for tables in chunks."""

import torch

from memory_kernels.chunks import kernel_table
from tests.devices import TEST_DEVICE


def table_of(num_chunks: int) -> list[torch.Tensor]:
    return list(torch.zeros(num_chunks, 4, device=TEST_DEVICE).split(1))


def test_addresses_are_those_of_the_chunks():
    chunks = table_of(3)
    assert kernel_table(chunks).tolist() == [chunk.data_ptr() for chunk in chunks]
    assert kernel_table(chunks[:1]) is chunks[0]


def test_addresses_are_kept_while_many_other_tables_are_read():
    """64 layers, each with a table, and eight gradients, shadows and states."""
    chunks = table_of(2)
    addresses = kernel_table(chunks)
    others = [table_of(2) for _ in range(64 * 9)]
    for other in others:
        kernel_table(other)
    assert kernel_table(chunks) is addresses
