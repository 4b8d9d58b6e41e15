"""weighted_bag's Triton forward against the definition in fp64."""

import pytest
import torch
import torch.nn.functional as F

from memory_kernels import Fp8Shadow, weighted_bag
from memory_kernels.bag.reference import weighted_bag_reference
from memory_kernels.shadow import dequantize_rows
from tests.devices import TEST_DEVICE
from tests.kernels.bag_cases import SHAPES, make_case
from tests.kernels.triton.tolerance import assert_close_to_exact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("pattern", ["random", "one row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_definition(shape, dtype, pattern, gated):
    case = make_case(shape, dtype, torch.int32, pattern).to(TEST_DEVICE)
    y = weighted_bag(case.table, case.indices, case.weights, case.gate if gated else None)
    exact = case.exact()
    golden = weighted_bag_reference(exact.table, exact.indices, exact.weights)
    assert_close_to_exact(y, golden * F.silu(exact.gate) if gated else golden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_are_one_table(dtype):
    case = make_case(SHAPES[4], dtype, torch.int64).to(TEST_DEVICE)
    chunks = [chunk.clone() for chunk in case.table.detach().split(300)]
    whole = weighted_bag(case.table, case.indices, case.weights, case.gate)
    assert torch.equal(weighted_bag(chunks, case.indices, case.weights, case.gate), whole)


def test_fp8_values_are_read_in_the_tables_place():
    case = make_case(SHAPES[4], torch.bfloat16, torch.int64).to(TEST_DEVICE)
    shadow = Fp8Shadow.of(case.table.detach())
    y = weighted_bag(case.table, case.indices, case.weights, shadow=shadow)
    values = dequantize_rows(shadow.values[0], shadow.scales)
    golden = weighted_bag_reference(values.double(), case.indices, case.weights.double())
    assert_close_to_exact(y, golden)


@pytest.mark.parametrize("tokens, bag", [(0, 4), (3, 0), (0, 0)])
def test_empty_input(tokens: int, bag: int):
    table = torch.full((5, 8), torch.nan, device=TEST_DEVICE)
    indices = torch.zeros(tokens, bag, dtype=torch.int32, device=TEST_DEVICE)
    y = weighted_bag(table, indices, torch.zeros(tokens, bag, device=TEST_DEVICE))
    assert torch.equal(y, torch.zeros(tokens, 8, device=TEST_DEVICE))
