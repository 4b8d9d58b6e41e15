"""bf16 tables: exact masters, stochastic rounding, and the fp8 shadow that follows them."""

import pytest
import torch

from memory_kernels import Fp8Shadow
from memory_kernels.optimizers import RowAdagrad, RowAdam, RowSGD, RowWiseAdagrad
from memory_kernels.optimizers.precision import (
    join_master,
    random_bits,
    round_stochastically,
    split_master,
)
from tests.devices import TEST_DEVICE
from tests.kernels.optimizers.cases import make_generator, make_gradient, make_table

OPTIMIZERS = [RowSGD, RowAdagrad, RowWiseAdagrad, RowAdam]


def _floats(bits: list[int]) -> torch.Tensor:
    signed = [b - 2**32 if b >= 2**31 else b for b in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def test_master_keeps_every_number():
    drawn = torch.randint(-(2**31), 2**31, (1 << 16,), generator=make_generator()).int()
    edges = _floats([0, 1 << 31, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000])
    values = torch.cat((drawn.view(torch.float32), edges, -edges))
    values = values[~values.isnan()]
    table, remainder = split_master(values)
    assert torch.equal(join_master(table, remainder).view(torch.int32), values.view(torch.int32))
    # Nearest: off by half a unit at most, where bf16's range allows.
    fits = values.abs() < torch.finfo(torch.bfloat16).max
    tie = values.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(table[fits & ~tie], values.bfloat16()[fits & ~tie])
    assert (table[tie & fits].float().abs() >= values[tie & fits].abs()).all()


def test_nan_stays_nan_whatever_its_bits():
    """0x7FFFFFFF is what GPUs make; plain rounding of its bits would show zero in the table."""
    values = _floats([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFF8000])
    table, remainder = split_master(values)
    assert table.isnan().all()
    assert join_master(table, remainder).isnan().all()
    rows = torch.arange(len(values))
    assert round_stochastically(values[:, None], 0, 1, rows).isnan().all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_master_trains_as_fp32_does(optimizer):
    """Bit for bit: the master is the fp32 table, the table its rounding."""
    start = make_table(17, 6, torch.bfloat16)
    low, full = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    optimizers = optimizer([low], lr=1e-3), optimizer([full], lr=1e-3)
    generator = make_generator()
    for _ in range(12):
        gradient = make_gradient(low, 5, generator)
        for each in optimizers:
            each.step(gradient, max_norm=2.0)
    assert torch.equal(optimizers[0].master_weights()[0], full.detach())
    assert torch.equal(low.detach(), split_master(full.detach())[0])
    assert not torch.equal(low.detach().float(), full.detach())


def test_random_bits_are_those_of_philox():
    """Known answer of Philox-4x32-10 with key and counter of zeros (Random123)."""
    rows = torch.zeros(1, dtype=torch.int64)
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert random_bits(0, 0, rows, 4).tolist() == [[word >> 16 for word in words]]


def test_random_bits_differ_by_row_step_seed_and_column():
    rows = torch.arange(64, device=TEST_DEVICE)
    draws = [random_bits(seed, step, rows, 63) for seed in (1, 2) for step in (1, 2)]
    drawn = torch.stack(draws).double()
    assert drawn.min() >= 0 and drawn.max() < 2**16
    # 16128 draws of 65536 values: pairs of equal ones beyond chance would show in their number.
    assert len(drawn.unique()) > 14000
    assert abs(drawn.mean() / 2**16 - 0.5) < 0.01


def test_stochastic_rounding_is_unbiased():
    """The mean of many roundings is the value: by one of 4096 draws' standard error times five."""
    values = torch.tensor([1.0, 1.001, -1.0037, 3e-5, 1e-39, 0.0, torch.inf]).expand(4096, -1)
    rounded = round_stochastically(values.contiguous(), 7, 3, torch.arange(4096))
    assert torch.equal(rounded[:, [0, 5, 6]].float(), values[:, [0, 5, 6]])
    value = values[0, 1:5].double()
    step = torch.tensor([2.0**-7, 2.0**-7, 2.0**-23, 2.0**-133], dtype=torch.float64)
    mean = rounded[:, 1:5].double().mean(0)
    assert ((mean - value).abs() <= 5 * step / 2 / 64).all()
    assert ((rounded[:, 1:5].double() - value).abs() < step).all()


def test_stochastic_rounding_does_not_lose_small_updates():
    ones = torch.ones(8, 512, dtype=torch.bfloat16, device=TEST_DEVICE)
    tables = [ones.clone(), ones.clone()]
    optimizers = [
        RowSGD([tables[0]], lr=1e-3, master="stochastic"),
        RowSGD([tables[1]], lr=1e-3, master=None),
    ]
    for _ in range(20):
        gradient = make_gradient(tables[0], 8, make_generator())
        gradient.gradients.fill_(1.0)
        for optimizer in optimizers:
            optimizer.step(gradient)
    assert abs(tables[0].float().mean() - 0.98) < 1e-3
    assert torch.equal(tables[1], torch.ones_like(tables[1]))


@pytest.mark.parametrize("master", ["exact", "stochastic", None])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_shadow_follows_the_table(optimizer, master):
    table = torch.nn.Parameter(make_table(17, 6, torch.bfloat16))
    shadow = Fp8Shadow.of(table)
    opt = optimizer([{"params": [table], "shadow": shadow}], lr=0.5, master=master)
    generator = make_generator()
    for _ in range(4):
        opt.step(make_gradient(table, 5, generator))
    if optimizer is RowAdam:
        opt.flush()
    wanted = Fp8Shadow.of(table)
    assert torch.equal(shadow.bytes()[0], wanted.bytes()[0])
    assert torch.equal(shadow.scales, wanted.scales)


def test_adam_with_bf16_moments_stays_close():
    tables = [torch.nn.Parameter(make_table(17, 6)) for _ in range(2)]
    optimizers = [
        RowAdam([table], moments_dtype=dtype)
        for table, dtype in zip(tables, (torch.bfloat16, torch.float32), strict=True)
    ]
    assert optimizers[0].state[tables[0]]["exp_avg"].dtype == torch.bfloat16
    generator = make_generator()
    for _ in range(10):
        gradient = make_gradient(tables[0], 5, generator)
        for optimizer in optimizers:
            optimizer.step(gradient)
    # Ten steps of 1e-3 with moments of eight bits.
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=10 * 1e-3 * 2**-7)
    assert not torch.equal(*tables)
