"""The fp8 shadow's definition on torch operators."""

import pytest
import torch

from memory_kernels import Fp8Shadow, choice
from memory_kernels.shadow import dequantize_rows, quantize_rows
from tests.devices import TEST_DEVICE
from tests.kernels.optimizers.cases import make_table


@pytest.fixture(autouse=True)
def on_torch():
    before = choice.kernels_in_use()
    choice.use_kernels("torch")
    yield
    choice.use_kernels(before)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_within_e4m3s_rounding(dtype, magnitude):
    rows = (make_table(50, 33) * magnitude).to(dtype)
    read = dequantize_rows(*quantize_rows(rows)).double()
    exact = rows.double()
    # Four significant bits: half a unit is 2^-4 of the value, below the smallest normal number
    # 2^-10 of the scale, which is the largest magnitude / 224 at most.
    largest = exact.abs().amax(-1, keepdim=True)
    bound = torch.maximum(exact.abs() / 16, largest / 224 / 1024)
    assert ((read - exact).abs() <= bound).all()


def test_scales_are_the_least_powers_of_two_that_fit():
    largest = torch.tensor([448.0, 448.0001, 449.0, 224.0, 225.0, 1.75, 1.76, 0.0, 2e-38, 1e-45])
    rows = torch.stack((largest, -largest / 2), 1).to(TEST_DEVICE)
    _, scales = quantize_rows(rows)
    smallest = 2.0**-126
    wanted = [1, 2, 2, 0.5, 1, 2**-8, 2**-7, 1, smallest, smallest]
    assert scales.tolist() == wanted


def test_what_is_not_finite_becomes_nan_and_leaves_its_row_alone():
    row = torch.tensor([[1.0, torch.nan, -3.0, torch.inf, -torch.inf, 0.0]], device=TEST_DEVICE)
    finite = row.isfinite()
    read = dequantize_rows(*quantize_rows(row))
    assert torch.equal(read[finite], row[finite])
    assert read[~finite].isnan().all()


def test_chunks_are_quantised_as_one_table():
    table = make_table(11, 5, torch.bfloat16)
    whole, parts = Fp8Shadow.of(table), Fp8Shadow.of(table.split(4))
    assert [len(chunk) for chunk in parts.values] == [4, 4, 3]
    assert torch.equal(torch.cat(parts.bytes()), whole.bytes()[0])
    assert torch.equal(parts.scales, whole.scales)


@pytest.mark.parametrize("rows, columns", [(0, 4), (3, 0)])
def test_empty_tables(rows: int, columns: int):
    shadow = Fp8Shadow.of(torch.zeros(rows, columns, device=TEST_DEVICE))
    assert shadow.values[0].shape == (rows, columns)
    assert torch.equal(shadow.scales, torch.ones(rows, device=TEST_DEVICE))


def test_another_cut_is_an_error():
    shadow = Fp8Shadow.of(torch.zeros(4, 3, device=TEST_DEVICE))
    with pytest.raises(ValueError, match="shadow: values cut as the table"):
        shadow.write(torch.zeros(5, 3, device=TEST_DEVICE))


def test_values_at_other_addresses_than_the_shape_says_are_refused():
    shadow = Fp8Shadow.of(make_table(4, 8))
    wide = torch.zeros(4, 16, dtype=torch.uint8, device=TEST_DEVICE).view(torch.float8_e4m3fn)
    for values in (wide[:, :8], shadow.values[0].float().to(torch.float8_e5m2)):
        with pytest.raises(ValueError, match=r"^shadow: contiguous values in torch.float8_e4m3fn"):
            Fp8Shadow(values=[values], scales=shadow.scales)
    with pytest.raises(ValueError, match=r"^shadow: contiguous values"):
        Fp8Shadow(values=shadow.values, scales=shadow.scales.double())


def test_operator_passes_opcheck():
    table = [make_table(3, 4)]
    values = [torch.zeros(3, 4, dtype=torch.uint8, device=TEST_DEVICE)]
    scales = torch.zeros(3, device=TEST_DEVICE)
    torch.library.opcheck(torch.ops.memory_kernels.quantize_rows.default, (table, values, scales))
