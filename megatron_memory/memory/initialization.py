"""Initial values of the memory parameters, after the paper's released settings."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_COLUMNS_A_BLOCK = 32
_MAX_BLOCK_ELEMENTS = 2**24
_ROWS_SKIPPED = 2**16


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
    for block in _blocks(first_column, last_column):
        generator = _block_generator(device, seed, table_number, block)
        wanted, place = _columns_of_block(block, first_column, last_column)
        for row in range(0, num_rows, rows_drawn):
            values = torch.empty(min(rows_drawn, num_rows - row), _COLUMNS_A_BLOCK, device=device)
            values.normal_(0.0, std, generator=generator)
            _write_rows([chunk[:, place] for chunk in chunks], row, values[:, wanted])


class FreshColumns:
    """What `init_table_columns_` fills a slice of a table with, a few rows at a time, on the CPU.

    A block's generator goes on from where it was, so that reading from the first row to the last
    draws each number once; another order starts again.

    Args:
        std: of the values.
        first_column: of the whole table, where the slice begins.
        last_column: before which it ends.
        seed: of the run.
        table_number: tells the tables of a model apart.
    """

    def __init__(
        self, *, std: float, first_column: int, last_column: int, seed: int, table_number: int
    ):
        self._std, self._first, self._last = std, first_column, last_column
        self._seeds = (seed, table_number)
        self._next_row = 0
        self._generators: dict[int, torch.Generator] = {}

    def read_rows(self, begin: int, end: int) -> Tensor:
        """Rows [end - begin, C], fp32."""
        if begin < self._next_row or not self._generators:
            cpu, self._next_row = torch.device("cpu"), 0
            self._generators = {
                block: _block_generator(cpu, *self._seeds, block)
                for block in _blocks(self._first, self._last)
            }
        rows = torch.empty(end - begin, self._last - self._first)
        for block, generator in self._generators.items():
            wanted, place = _columns_of_block(block, self._first, self._last)
            for row in range(self._next_row, begin, _ROWS_SKIPPED):
                self._draw(generator, min(_ROWS_SKIPPED, begin - row))
            rows[:, place] = self._draw(generator, end - begin)[:, wanted]
        self._next_row = end
        return rows

    def _draw(self, generator: torch.Generator, num_rows: int) -> Tensor:
        """The generator's next rows, [num_rows, 32]."""
        # torch's CPU generator makes normal numbers in groups of 16: half a row's, so that it does
        # not matter where a sequence of rows is cut.
        values = torch.empty(num_rows, _COLUMNS_A_BLOCK)
        return values.normal_(0.0, self._std, generator=generator)


def _blocks(first_column: int, last_column: int) -> range:
    """Numbers of the blocks of columns that a slice touches."""
    return range(first_column // _COLUMNS_A_BLOCK, -(-last_column // _COLUMNS_A_BLOCK))


def _columns_of_block(block: int, first_column: int, last_column: int) -> tuple[slice, slice]:
    """Which of a block's columns a slice has, and where."""
    offset = block * _COLUMNS_A_BLOCK
    start, end = max(first_column, offset), min(last_column, offset + _COLUMNS_A_BLOCK)
    return slice(start - offset, end - offset), slice(start - first_column, end - first_column)


def _block_generator(
    device: torch.device, seed: int, table_number: int, block: int
) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(_block_seed(seed, table_number, block))
    return generator


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
