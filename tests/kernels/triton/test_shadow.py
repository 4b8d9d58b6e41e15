"""Conversions to and from e4m3 in kernels, and the quantisation of tables, against torch's bits."""

import pytest
import torch
import triton
import triton.language as tl

from memory_kernels import Fp8Shadow, choice
from memory_kernels.shadow_triton import (
    e4m3_to_float,
    e4m3_to_float_by_bits,
    float_to_e4m3,
    plan_quantize_rows,
)
from tests.devices import TEST_DEVICE
from tests.kernels.optimizers.cases import make_generator, make_table


@triton.jit
def _decode(out, by_bits, codes, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    read = tl.load(codes + offsets)
    tl.store(out + offsets, e4m3_to_float(read))
    tl.store(by_bits + offsets, e4m3_to_float_by_bits(read))


@triton.jit
def _encode(codes, values, SIZE: tl.constexpr):
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(codes + offsets, float_to_e4m3(tl.load(values + offsets)))


def test_all_256_codes_are_read_as_torch_reads_them():
    codes = torch.arange(256, dtype=torch.uint8, device=TEST_DEVICE)
    out = torch.empty(256, device=TEST_DEVICE)
    by_bits = torch.empty(256, device=TEST_DEVICE)
    _decode[(1,)](out, by_bits, codes, SIZE=256)
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(wanted.isnan(), codes % 128 == 127)
    number = ~wanted.isnan()
    for ours in (out, by_bits):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours[number].signbit(), wanted[number].signbit())


def _values_to_encode() -> torch.Tensor:
    """Every code's value, the midpoints between neighbours, the floats beside those, and floats of
    random bits."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    exact = torch.cat((codes, middles, torch.tensor([448.1, 463.9, 464.0, 1e30, 1e-45, 1e-40])))
    near = torch.cat((exact, exact.nextafter(torch.tensor(9e9)), exact.nextafter(-torch.ones(()))))
    drawn = torch.randint(-(2**31), 2**31, (4096,), generator=make_generator()).to(torch.int32)
    random = torch.randn(4096, generator=make_generator()) * 0.1
    all_values = torch.cat((near, -near, drawn.view(torch.float32), random))
    return torch.nn.functional.pad(all_values, (0, -len(all_values) % 1024))


def test_floats_become_the_codes_that_torch_has():
    values = _values_to_encode().to(TEST_DEVICE)
    codes = torch.empty(len(values), dtype=torch.uint8, device=TEST_DEVICE)
    _encode[(len(values) // 1024,)](codes, values, SIZE=1024)
    wanted = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    wanted = torch.where(values.isfinite(), wanted, 0x7F)
    assert torch.equal(codes, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, columns, chunk", [(70, 3, 70), (9, 257, 4), (3, 5000, 3)])
def test_tables_have_the_bits_of_the_torch_path(rows, columns, chunk, dtype):
    table = make_table(rows, columns, dtype)
    table[0] = 0.0
    table[1, 0], table[1, 1], table[1, 2] = torch.nan, torch.inf, -torch.inf
    table[2] = 1.75  # just fits e4m3's 448 by a power of two
    chunks = list(table.split(chunk))
    ours = Fp8Shadow.of(chunks)
    choice.use_kernels("torch")
    wanted = Fp8Shadow.of(chunks)
    assert torch.equal(torch.cat(ours.bytes()), torch.cat(wanted.bytes()))
    assert torch.equal(ours.scales, wanted.scales)


def test_only_the_rows_that_hold_are_written():
    table = make_table(12, 6)
    wanted = Fp8Shadow.of(table)
    values = [torch.full((12, 6), 7, dtype=torch.uint8, device=TEST_DEVICE)]
    scales = torch.full((12,), 7.0, device=TEST_DEVICE)
    rows = torch.tensor([2, 5, 11, 0], device=TEST_DEVICE)
    num_rows = torch.tensor([3], dtype=torch.int32, device=TEST_DEVICE)
    plan_quantize_rows([table], values, scales, rows, num_rows).run()
    written = torch.zeros(12, dtype=torch.bool, device=TEST_DEVICE)
    written[rows[:3]] = True
    assert torch.equal(values[0][written], wanted.bytes()[0][written])
    assert torch.equal(scales[written], wanted.scales[written])
    assert values[0][~written].eq(7).all()
    assert scales[~written].eq(7).all()


@pytest.mark.parametrize("rows, columns", [(0, 4), (3, 0)])
def test_empty_tables(rows: int, columns: int):
    shadow = Fp8Shadow.of(torch.zeros(rows, columns, device=TEST_DEVICE))
    assert torch.equal(shadow.scales, torch.ones(rows, device=TEST_DEVICE))
