"""What growth is made of, against its definitions."""

from pathlib import Path

import pytest
import torch

from megatron_memory.conversion import lazy
from megatron_memory.conversion.dcp_files import write_dcp
from megatron_memory.conversion.growth.add import largest_first_update
from megatron_memory.conversion.growth.half_keys import _turned, are_new, stretched_table
from megatron_memory.conversion.growth.options import Checkpoints
from megatron_memory.conversion.growth.tensors import changed
from megatron_memory.conversion.growth.value_dim import _check
from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.memory.initialization import FreshColumns
from megatron_memory.runtime.adam import FusedAdam
from memory_kernels import product_key_topk
from tests.memory_growth import growth
from tests.tiny import tiny_config


@pytest.mark.parametrize("copies", [2, 4])
def test_rows_of_a_stretched_table_are_their_pairs_rows(copies: int):
    half_keys, width = 3, 5
    table = torch.arange(half_keys**2 * width, dtype=torch.float32).view(-1, width)
    stretched = stretched_table(from_memory(table), half_keys, copies, 1.0, 0.5)
    grown = half_keys * copies
    assert stretched.shape == (grown**2, width)
    i, j = torch.arange(grown**2) // grown, torch.arange(grown**2) % grown
    is_old = (i < half_keys) & (j < half_keys)
    assert torch.equal(are_new(torch.arange(grown**2), half_keys, copies), ~is_old)
    parents = table[i % half_keys * half_keys + j % half_keys]
    expected = parents * torch.where(is_old, 1, 0.5)[:, None]
    for begin, end in ((0, grown**2), (1, 2), (grown - 1, 3 * grown + 1), (7, grown**2 - 1)):
        assert torch.equal(stretched.read_rows(begin, end), expected[begin:end])


def test_a_table_grows_in_memory_of_a_block(tmp_path: Path, monkeypatch):
    """64 MiB are written in blocks of 2 MiB, each read, copied and serialised: a few at a time."""
    monkeypatch.setattr(lazy, "_BLOCK_BYTES", 2**21)
    half_keys, width = 128, 256
    columns = FreshColumns(std=1.0, first_column=0, last_column=width, seed=1, table_number=0)
    shape = (half_keys**2, width)
    table = LazyTensor(shape=shape, dtype=torch.float32, read_rows=columns.read_rows)
    stretched = stretched_table(table, half_keys, 2)
    assert growth(lambda: write_dcp(tmp_path / "grown", {"table": stretched})) < 32 * 2**20
    written = sum(file.stat().st_size for file in (tmp_path / "grown").iterdir())
    assert written >= 64 * 2**20


@pytest.mark.parametrize("scale", [0.0, 0.5, 0.9])
def test_kept_reads_change_a_heads_sum_within_the_bound(scale: float):
    """And the bound is not idle: somewhere more than a quarter of it is reached."""
    generator = torch.Generator().manual_seed(1)
    tokens, heads, half_keys, k, width = 200, 2, 8, 4, 16
    query = torch.randn(tokens, heads, 12, generator=generator)
    keys = torch.randn(heads, 2, half_keys, 6, generator=generator)
    table = torch.randn(half_keys**2, width, generator=generator)
    grown_keys = torch.cat((keys, keys * scale), dim=2)
    grown_table = stretched_table(from_memory(table), half_keys, 2).read()
    indices, weights = product_key_topk(query, keys, k)
    new_indices, new_weights = product_key_topk(query, grown_keys, k)
    before = (weights[..., None] * table[indices]).sum(2)
    after = (new_weights[..., None] * grown_table[new_indices]).sum(2)
    is_new = are_new(new_indices, half_keys, 2)
    bound = 2 * (new_weights * is_new).sum(-1) * table.norm(dim=1).max()
    change = (after - before).norm(dim=-1)
    assert (change <= bound + 1e-5).all() and is_new.any()
    assert (change[bound > 0] / bound[bound > 0]).max() > 0.25


def test_a_projection_of_pkm_is_not_lost():
    config = tiny_config("pkm", memory={"value_dim": 24})
    with pytest.raises(ConfigurationError, match="--value-dim 32 is the hidden size"):
        _check(config, 32)
    _check(config, 40)


def test_unknown_states_are_refused_with_a_flag_that_there_is():
    state = SavedState(config=tiny_config("pkm"), vocab_size=8, weights={}, moments={"sum": {}})
    with pytest.raises(CheckpointError, match="--weights-only"):
        changed(state, lambda kind, name, tensor: tensor)
    assert Checkpoints(load="a", save="b", weights_only=True)


def test_turned_keys_keep_their_length_and_have_the_angle():
    keys = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(2))
    turned = _turned(keys, 0.5, torch.Generator().manual_seed(3))
    cosine = torch.nn.functional.cosine_similarity(keys, turned, dim=-1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, 0.5))
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1))


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
def test_late_zero_moments_move_as_far_as_is_said(betas: tuple[float, float]):
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = FusedAdam([parameter], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0)
    optimizer.param_groups[0]["step"] = 100_000
    steps = []
    for _ in range(60):
        before = parameter.item()
        parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        steps.append(abs(parameter.item() - before))
    assert max(steps) == pytest.approx(largest_first_update(*betas), rel=1e-6)
