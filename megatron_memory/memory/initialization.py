"""Initial values of the memory parameters, after the paper's released settings."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_COLUMNS_A_BLOCK = 32
_MAX_BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def init_table_columns_(
    chunks: Sequence[Tensor], *, std: float, first_column: int, seed: int, table_number: int
) -> None:
    """Fill a slice of a value table with N(0, std), the same values however the table is split.

    Every block of 32 columns of the whole table has a generator of its own, so that a rank makes
    its columns alone. The values depend on the kind of device, CPU or CUDA, whose generators
    differ.

    Args:
        chunks: the rows [S, C] of this rank's columns, cut into any number of tensors.
        first_column: the whole table's column that the slice's first one is.
        seed: of the run.
        table_number: tells the tables of a model apart.
    """
    num_rows, device = sum(len(chunk) for chunk in chunks), chunks[0].device
    last_column = first_column + chunks[0].shape[1]
    rows_drawn = max(1, _MAX_BLOCK_ELEMENTS // _COLUMNS_A_BLOCK)
    for block in range(first_column // _COLUMNS_A_BLOCK, -(-last_column // _COLUMNS_A_BLOCK)):
        generator = torch.Generator(device)
        generator.manual_seed(_block_seed(seed, table_number, block))
        offset = block * _COLUMNS_A_BLOCK
        start, end = max(first_column, offset), min(last_column, offset + _COLUMNS_A_BLOCK)
        for row in range(0, num_rows, rows_drawn):
            values = torch.empty(min(rows_drawn, num_rows - row), _COLUMNS_A_BLOCK, device=device)
            values.normal_(0.0, std, generator=generator)
            targets = [chunk[:, start - first_column : end - first_column] for chunk in chunks]
            _write_rows(targets, row, values[:, start - offset : end - offset])


def _write_rows(targets: Sequence[Tensor], first_row: int, values: Tensor) -> None:
    """Write values to consecutive rows, counted over all targets."""
    begin, end = first_row, first_row + len(values)
    start = 0
    for target in targets:
        first, last = max(begin, start), min(end, start + len(target))
        if first < last:
            target[first - start : last - start] = values[first - begin : last - begin].to(
                target.dtype
            )
        start += len(target)


def _block_seed(seed: int, table_number: int, block: int) -> int:
    """One seed a block, of 32 bits: torch's CPU generator heeds no others.

    A run's 2**20 blocks of 32 columns and 2**10 tables never meet; the run's seed is spread over
    all bits, so that the blocks of two runs hardly do.
    """
    of_run = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "little")
    return (of_run + (table_number << 20) + block) % 2**32


@torch.no_grad()
def init_keys_(keys: Tensor, key_dim: int) -> None:
    """Uniform within ±1 / sqrt(key_dim); keys [H, 2, N, key_dim / 2]."""
    bound = key_dim**-0.5
    keys.uniform_(-bound, bound)
