"""Initial values: the table's do not depend on how it is split, and differ where they should."""

import math

import pytest
import torch

from megatron_memory.memory import initialization
from megatron_memory.memory.initialization import (
    FreshColumns,
    init_keys_,
    init_table_columns_,
)

ROWS = 50


def table_slice(first: int, columns: int, *, seed: int = 1234, number: int = 0, **options):
    """Columns first to first + columns of a table with std 1."""
    weight = torch.full((options.pop("rows", ROWS), columns), float("nan"), **options)
    init_table_columns_([weight], std=1.0, first_column=first, seed=seed, table_number=number)
    return weight


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("columns", [12, 36, 96, 132, 300])
def test_slices_of_any_number_of_ranks_make_up_the_same_table(columns: int, ranks: int):
    whole = table_slice(0, columns)
    width = columns // ranks
    slices = [table_slice(rank * width, width) for rank in range(ranks)]
    assert torch.equal(torch.cat(slices, dim=1), whole)


def test_a_table_of_several_chunks_is_the_same_however_it_is_split(monkeypatch):
    monkeypatch.setattr(initialization, "_MAX_BLOCK_ELEMENTS", 32 * 7)
    whole = table_slice(0, 48)
    assert not whole.isnan().any()
    assert torch.equal(torch.cat([table_slice(0, 24), table_slice(24, 24)], dim=1), whole)


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 49])
def test_a_table_in_row_chunks_has_the_same_values(rows: int, monkeypatch):
    """Chunks end within and at the blocks of seven rows that are drawn at once."""
    monkeypatch.setattr(initialization, "_MAX_BLOCK_ELEMENTS", 32 * 7)
    whole = table_slice(5, 48)
    chunks = [torch.full_like(part, float("nan")) for part in whole.split(rows)]
    init_table_columns_(chunks, std=1.0, first_column=5, seed=1234, table_number=0)
    assert torch.equal(torch.cat(chunks), whole)


def test_columns_read_a_few_rows_at_a_time_are_the_same(monkeypatch):
    """In order, again from the start, and with rows left out, more than are skipped at once."""
    monkeypatch.setattr(initialization, "_ROWS_SKIPPED", 3)
    whole = table_slice(5, 48)
    columns = FreshColumns(std=1.0, first_column=5, last_column=53, seed=1234, table_number=0)
    for begin, end in ((0, 1), (1, 20), (20, ROWS), (0, 7), (15, 15), (30, 31)):
        assert torch.equal(columns.read_rows(begin, end), whole[begin:end])


def test_values_are_normal_with_the_given_deviation():
    weight = torch.empty(4000, 40)
    init_table_columns_([weight], std=0.25, first_column=0, seed=1, table_number=0)
    # 160000 draws: the mean's own deviation is 0.25 / 400, the standard deviation's 0.25 / 566.
    assert abs(weight.mean().item()) < 5 * 0.25 / 400
    assert weight.std().item() == pytest.approx(0.25, abs=5 * 0.25 / 566)
    # Kurtosis tells a normal distribution (3) from a uniform one (1.8); its own deviation is 0.012.
    assert (weight / 0.25).pow(4).mean().item() == pytest.approx(3.0, abs=0.08)


def test_columns_are_independent():
    columns = table_slice(0, 96, rows=2000)
    correlation = torch.corrcoef(columns.T) - torch.eye(96)
    assert correlation.abs().max() < 6 / math.sqrt(2000)


def test_bf16_is_the_rounded_fp32_table():
    assert torch.equal(table_slice(0, 40, dtype=torch.bfloat16), table_slice(0, 40).bfloat16())


def have_a_column_in_common(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether any column of one is any column of the other."""
    return bool((first.T[:, None] == second.T[None]).all(dim=-1).any())


@pytest.mark.parametrize("other", [0, 1, 1235, 1234 + 4, 1234 + 2**10, 1234 + 2**32, 2**63])
def test_seeds_differ(other: int):
    assert not have_a_column_in_common(table_slice(0, 160, seed=other), table_slice(0, 160))


@pytest.mark.parametrize("other", [1, 2, 511])
def test_tables_of_a_model_differ(other: int):
    assert not have_a_column_in_common(table_slice(0, 160, number=other), table_slice(0, 160))


def test_the_generator_of_the_run_is_left_alone():
    state = torch.get_rng_state()
    table_slice(0, 40)
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_are_uniform_within_their_bound():
    keys = torch.empty(4, 2, 64, 32)
    init_keys_(keys, key_dim=64)
    bound = 1 / 8
    assert keys.abs().max() <= bound
    assert keys.max() > 0.99 * bound
    assert keys.min() < -0.99 * bound
    assert keys.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
