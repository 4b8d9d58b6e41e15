"""Figures of tensors against torch on the whole tensor."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_memory.conversion import lazy
from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.safetensors_files import read_weight_files, write_weight_files
from megatron_memory.inspection import figures as figures_module
from megatron_memory.inspection.figures import figures_of
from tests.memory_growth import growth


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch):
    """So that a few hundred numbers are several blocks, and several slices of them."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 512)
    monkeypatch.setattr(figures_module, "_SLICE", 48)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(dtype)


def _figures(tensor: Tensor, name: str = "weight"):
    return figures_of(name, from_memory(tensor), with_digest=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 7), (500,), (2, 3, 5, 4), ()])
def test_sums_of_blocks_are_those_of_the_whole(shape: tuple, dtype: torch.dtype):
    tensor = _random(*shape, dtype=dtype)
    if tensor.dim():
        tensor[1:3] = 0
    found, exact = _figures(tensor), tensor.double()
    # Sums in fp64 of at most 500 numbers near 1.
    assert found.norm == pytest.approx(exact.norm().item(), rel=1e-12)
    assert found.mean == pytest.approx(exact.mean().item(), rel=1e-12)
    assert (found.lowest, found.highest) == (exact.min().item(), exact.max().item())
    assert found.largest == exact.abs().max().item()
    assert found.num_zeros == int((tensor == 0).sum())
    assert (found.num_nan, found.num_infinite) == (0, 0)
    assert found.is_constant == (not shape)


def test_whole_numbers_and_empty_tensors():
    found = _figures(torch.arange(-5, 300))
    assert (found.norm, found.lowest, found.highest, found.num_zeros) == (
        pytest.approx(torch.arange(-5, 300).double().norm().item(), rel=1e-12),
        *(-5, 299, 1),
    )
    empty = _figures(torch.empty(0, 4))
    assert (empty.norm, empty.mean, empty.num_zeros, empty.is_constant) == (0, 0, 0, False)
    assert _figures(torch.full((90,), 2.5)).is_constant


def test_what_is_not_finite_is_counted_and_left_out():
    tensor = _random(40, 7, dtype=torch.bfloat16)
    clean = tensor.clone()
    tensor[3, 2] = tensor[39, 6] = math.nan
    tensor[4, 1], tensor[20, 0] = math.inf, -math.inf
    bad = ~tensor.isfinite()
    found = _figures(tensor)
    assert (found.num_nan, found.num_infinite) == (2, 2)
    assert found.norm == pytest.approx(clean[~bad].double().norm().item(), rel=1e-12)
    assert found.mean == pytest.approx(clean[~bad].double().mean().item(), rel=1e-12)
    only = _figures(torch.full((3, 60), math.nan))
    assert (only.norm, only.num_nan, only.is_constant) == (0, 180, False)


def test_digests_are_of_the_bytes_and_not_of_the_blocks(monkeypatch: pytest.MonkeyPatch):
    tensor = _random(40, 7)
    digest = _figures(tensor).digest
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 2**20)
    assert _figures(tensor).digest == digest
    other = tensor.clone()
    other[39, 6] = -other[39, 6]
    assert _figures(other).digest != digest
    assert figures_of("weight", from_memory(tensor), with_digest=False).digest is None


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(8, torch.float32), (7, torch.float32), (5, torch.bfloat16), (4, torch.bfloat16)],
)
def test_rows_of_tables(width: int, dtype: torch.dtype):
    table = _random(60, width, dtype=dtype)
    table[[3, 30, 59]] = 0
    table[[40, 50]] = table[2].clone()
    # Not the same rows, though their sums may be.
    table[10] = table[9]
    table[10, :2] = -table[9, :2]
    table[12] = table[11].flip(0)
    found = _figures(table, "memory.shared.values.weight")
    assert (found.num_zero_rows, found.num_repeated_rows) == (3, 2)
    assert _figures(table, "output_layer.weight").num_zero_rows is None
    copies = table[:1].expand(60, -1)
    assert _figures(copies, "layers.1.feed_forward.values_u.weight").num_repeated_rows == 59


def test_tiny_keys():
    keys = _random(2, 2, 16, 4)
    keys[0, 1, 3] *= 1e-5
    keys[1, 0, 15] = 0
    assert _figures(keys, "decoder.layers.1.mlp.router.keys").num_tiny_keys == 2
    assert _figures(keys.view(-1, 4), "model.layers.1.feed_forward.keys").num_tiny_keys == 2
    assert _figures(keys, "decoder.layers.1.mlp.keys").num_tiny_keys is None


def test_memory_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A table of 96 MiB in blocks of 4: read, and each number widened to fp64 a slice at a time."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 4 * 2**20)
    monkeypatch.setattr(figures_module, "_SLICE", 2**16)
    block = _random(64, 1024)
    table = LazyTensor(
        shape=(24 * 1024, 1024),
        dtype=torch.float32,
        read_rows=lambda begin, end: block.repeat(-(-(end - begin) // 64), 1)[: end - begin],
    )
    write_weight_files(tmp_path, {"values.weight": table}, 10**12)
    stored = read_weight_files(tmp_path)["values.weight"]
    found = []
    grown = growth(lambda: found.append(figures_of("values.weight", stored, with_digest=True)))
    assert grown < 24 * 2**20
    assert found[0].num_repeated_rows == 24 * 1024 - 64


def test_a_block_at_a_time():
    """Never more rows than a block has: the table need not fit in memory."""
    table, asked = _random(100, 16), []

    def read_rows(begin: int, end: int) -> Tensor:
        asked.append((begin, end))
        return table[begin:end]

    lazy_table = LazyTensor(shape=(100, 16), dtype=torch.float32, read_rows=read_rows)
    figures_of("memory.shared.values.weight", lazy_table, with_digest=True)
    # 512 bytes are 8 rows of 64.
    assert asked == [(begin, min(begin + 8, 100)) for begin in range(0, 100, 8)]
