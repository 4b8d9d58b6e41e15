"""Initial values of the memory parameters, after the paper's released settings."""

import hashlib

import torch
from torch import Tensor

_COLUMNS_A_BLOCK = 32
_MAX_BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def init_table_columns_(
    weight: Tensor, *, std: float, first_column: int, seed: int, table_number: int
) -> None:
    """Fill a slice of a value table with N(0, std), the same values however the table is split.

    Every block of 32 columns of the whole table has a generator of its own, so that a rank makes
    its columns alone. The values depend on the kind of device, CPU or CUDA, whose generators
    differ.

    Args:
        weight: [S, C], this rank's columns.
        first_column: the whole table's column that weight[:, 0] is.
        seed: of the run.
        table_number: tells the tables of a model apart.
    """
    num_rows, num_columns = weight.shape
    last_column = first_column + num_columns
    rows_a_chunk = max(1, _MAX_BLOCK_ELEMENTS // _COLUMNS_A_BLOCK)
    for block in range(first_column // _COLUMNS_A_BLOCK, -(-last_column // _COLUMNS_A_BLOCK)):
        generator = torch.Generator(weight.device)
        generator.manual_seed(_block_seed(seed, table_number, block))
        start = max(first_column, block * _COLUMNS_A_BLOCK)
        end = min(last_column, (block + 1) * _COLUMNS_A_BLOCK)
        for row in range(0, num_rows, rows_a_chunk):
            rows = min(rows_a_chunk, num_rows - row)
            values = torch.empty(rows, _COLUMNS_A_BLOCK, device=weight.device)
            values.normal_(0.0, std, generator=generator)
            offset = block * _COLUMNS_A_BLOCK
            weight[row : row + rows, start - first_column : end - first_column] = values[
                :, start - offset : end - offset
            ].to(weight.dtype)


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
