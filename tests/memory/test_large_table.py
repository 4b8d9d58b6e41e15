"""Tables of more than 2**31 elements: rows at their end are read, learn, and are saved and loaded.

Their memory is reserved and hardly used, but in the tests that LARGE_TABLES=1 in the environment
turns on: these take minutes, 5 GiB of memory and as much of the disk for temporary files.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_memory.config import Config, PrecisionConfig
from megatron_memory.memory import table as table_module
from megatron_memory.memory.initialization import init_table_columns_
from megatron_memory.memory.table import ValueTable
from megatron_memory.runtime import select_backend
from megatron_memory.training.checkpoint import loader, saver, state
from memory_kernels import row_dot, weighted_bag
from tests.memory_growth import growth
from tests.tiny import VOCAB, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

HALF_KEYS, COLUMNS, LAST = 8256, 32, 500
ROWS = HALF_KEYS**2
"""68 million; with 32 columns, 33 million elements more than 2**31."""
CHUNKINGS = {"chunks": table_module.MAX_CHUNK_ELEMENTS, "one parameter": 2**33}
TOKENS, READS = 6, 40
large = pytest.mark.skipif(
    os.environ.get("LARGE_TABLES") != "1", reason="minutes and 5 GiB: LARGE_TABLES=1 runs it"
)


def _config(**options) -> Config:
    return tiny_config(
        "memory+",
        memory={"num_half_keys": HALF_KEYS, "value_dim": COLUMNS},
        precision=PrecisionConfig(bf16=True),
        **options,
    )


@contextlib.contextmanager
def _uninitialized(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tables whose memory is reserved, and used by nobody yet."""
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "init_table_columns_", lambda *args, **options: None)
        yield


@pytest.fixture(params=CHUNKINGS)
def table(request, monkeypatch) -> ValueTable:
    """A large table with numbers in its last rows."""
    monkeypatch.setattr(table_module, "MAX_CHUNK_ELEMENTS", CHUNKINGS[request.param])
    with _uninitialized(monkeypatch):
        (table,) = tiny_model(_config()).memory.tables()
    assert sum(chunk.numel() for chunk in table.chunks) == ROWS * COLUMNS > 2**31
    assert (len(table.chunks) > 1) == (request.param == "chunks")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        table.chunks[-1][-LAST:] = torch.randn(LAST, COLUMNS, generator=generator)
    return table


def _reads() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows among the last, counted from the first of these; weights and a gradient, in bf16."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(LAST, (TOKENS, READS), generator=generator)
    rows[0, :2] = torch.tensor([0, LAST - 1])
    weights = torch.randn(TOKENS, READS, generator=generator).bfloat16()
    return rows, weights, torch.randn(TOKENS, COLUMNS, generator=generator).bfloat16()


def _small(table: ValueTable) -> torch.Tensor:
    return table.chunks[-1].detach()[-LAST:].clone()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_the_last_rows_are_read(table: ValueTable, dtype: torch.dtype):
    """As from a table that has no others: the same numbers in the same order."""
    rows, weights, gradient = _reads()
    indices = (rows + ROWS - LAST).to(dtype)
    assert torch.equal(
        weighted_bag(table.chunks, indices, weights), weighted_bag(_small(table), rows, weights)
    )
    assert torch.equal(
        row_dot(table.chunks, indices, gradient), row_dot(_small(table), rows, gradient)
    )


def test_the_last_rows_learn(table: ValueTable):
    """The gradient's buffers are as large as the table, and used where rows were read."""
    rows, weights, gradient = _reads()
    # torch.zeros would write them.
    buffers = [torch.from_numpy(np.zeros(chunk.shape, np.float32)) for chunk in table.chunks]
    of_all = weights.clone().requires_grad_()
    weighted_bag(table.chunks, rows + ROWS - LAST, of_all, main_grad=buffers).backward(gradient)
    small, buffer = _small(table), torch.zeros(LAST, COLUMNS)
    of_last = weights.clone().requires_grad_()
    weighted_bag(small, rows, of_last, main_grad=buffer).backward(gradient)
    assert torch.equal(buffers[-1][-LAST:], buffer)
    assert buffer[0].any() and buffer[-1].any()
    assert torch.equal(of_all.grad, of_last.grad)
    # Where 32 bits would have wrapped around to, and the rest of the last row's neighbourhood.
    assert not buffers[0][: 2 * LAST].any()
    assert not buffers[-1][-3 * LAST : -LAST].any()


@large
def test_initial_values_of_the_last_rows():
    """Drawn in one pass through all rows; cut into chunks or not."""
    whole = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    started = time.monotonic()
    init_table_columns_([whole], std=1.0, first_column=0, seed=1, table_number=0)
    print(f"{ROWS * COLUMNS:,} elements initialised in {time.monotonic() - started:.0f} s")
    for first in (0, ROWS // 2, ROWS - LAST):
        part = whole[first : first + LAST].float()
        # 16,000 numbers: four standard errors of their mean and of their standard deviation.
        assert abs(part.mean()) < 4 / 16000**0.5
        assert abs(part.std() - 1) < 4 / 32000**0.5
    assert not torch.equal(whole[:LAST], whole[-LAST:])


@large
def test_saved_and_loaded(monkeypatch, tmp_path: Path):
    """Rows are where they were, and memory grows by no copy of the table: in loading, by the one
    that is loaded, and twice a chunk while that is read."""
    config = _config()
    checkpoint = dataclasses.replace(
        config.checkpoint, save=str(tmp_path), no_save_optim=True, no_save_rng=True
    )
    config = dataclasses.replace(config, checkpoint=checkpoint)
    with _uninitialized(monkeypatch):
        model, other = tiny_model(config), tiny_model(config)
    _mark(model.memory.tables()[0])
    setup = SimpleNamespace(config=config, backend=select_backend("cpu"), model=[model])
    save = _told("saving", saver.CheckpointSaver(setup, VOCAB).save, state.Position(iteration=1))
    load = _told("loading", loader.load_weights, [other], config, VOCAB, tmp_path)
    _check_marks(other.memory.tables()[0])
    table_bytes, chunk_bytes = 2 * ROWS * COLUMNS, 2 * table_module.MAX_CHUNK_ELEMENTS
    assert save < chunk_bytes
    assert load < table_bytes + 2 * chunk_bytes + 2**28


def _told(what: str, call: Callable[..., object], *arguments: Any) -> int:
    """The bytes that it takes; says them, and the seconds."""
    started = time.monotonic()
    grown = growth(functools.partial(call, *arguments))
    print(f"{what}: {time.monotonic() - started:.0f} s, {grown / 2**30:.2f} GiB more")
    return grown


def _marked_rows(table: ValueTable) -> Iterator[tuple[int, torch.Tensor]]:
    """Some rows of every chunk, the very last one among them, with a number for each."""
    first = 0
    for chunk in table.chunks:
        for row in {*range(0, len(chunk), 8191), len(chunk) - 1}:
            yield (first + row) % 251 + 1, chunk[row]
        first += len(chunk)


@torch.no_grad()
def _mark(table: ValueTable) -> None:
    for number, row in _marked_rows(table):
        row.fill_(number)


def _check_marks(table: ValueTable) -> None:
    for number, row in _marked_rows(table):
        assert (row == number).all()
