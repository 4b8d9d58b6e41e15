"""Triton's backward of weighted_bag and row_dot against the definition in fp64."""

import pytest
import torch
from torch import Tensor

from memory_kernels import Fp8Shadow, RowGradients, merge_row_gradients, row_dot, weighted_bag
from memory_kernels.bag import triton_backward, triton_pieces
from memory_kernels.bag.reference import row_dot_reference, weighted_bag_reference
from memory_kernels.shadow import dequantize_rows
from tests.devices import TEST_DEVICE
from tests.kernels.bag_cases import SHAPES, Case, Shape, make_case
from tests.kernels.triton.tolerance import assert_close_to_exact

SMALL = Shape(tokens=7, bag=5, rows=40, columns=33)
SEVERAL_BLOCKS = SHAPES[3]
FORMS = ["dense", "main_grad", "rows"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def small_case(shape: Shape = SMALL, dtype=torch.float32, pattern: str = "random") -> Case:
    return make_case(shape, dtype, torch.int32, pattern).to(TEST_DEVICE)


@pytest.fixture
def small_slabs(monkeypatch):
    """As many borders as a large input has."""
    monkeypatch.setattr(triton_backward, "_SLAB_OF_FEW_READS", 4)
    monkeypatch.setattr(triton_pieces, "SLABS_A_GROUP", 3)


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever is made without a value holds NaN."""

    def poisoning(function):
        def make(*args, **kwargs):
            tensor = function(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -1)

        return make

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


def run(operator, case: Case, upstream: Tensor, form: str = "dense", table=None, **options):
    """Output, gradient of the other operand, and the table's gradient [S, D] of any form."""
    chunks = [case.table] if table is None else table
    chunks = [chunk.detach().clone().requires_grad_() for chunk in chunks]
    operand = case.weights if operator is weighted_bag else case.x
    operand = operand.detach().clone().requires_grad_()
    if form == "main_grad":
        options["main_grad"] = [torch.zeros_like(chunk, dtype=torch.float32) for chunk in chunks]
    elif form == "rows":
        options["row_gradients"] = RowGradients.empty(chunks, case.indices.numel())
    output = operator(chunks, case.indices, operand, **options)
    output.backward(upstream)
    if form == "dense":
        gradient = torch.cat([chunk.grad for chunk in chunks])
    elif form == "main_grad":
        gradient = torch.cat(options["main_grad"])
    else:
        gradient = densified(options["row_gradients"], len(case.table))
    return output.detach(), operand.grad, gradient


def densified(held: RowGradients, num_rows: int) -> Tensor:
    held = held.trimmed()
    assert torch.equal(held.rows, held.rows.unique())
    norms = held.gradients.float().square().sum(-1)
    torch.testing.assert_close(held.squared_norms, norms, rtol=1e-5, atol=0)
    dense = held.gradients.new_zeros(num_rows, held.gradients.shape[1])
    return dense.index_copy(0, held.rows, held.gradients)


def exact(operator, case: Case, upstream: Tensor, table: Tensor | None = None):
    """What `run` gives, in fp64."""
    operand = case.weights if operator is weighted_bag else case.x
    leaves = [case.table if table is None else table, operand]
    table, operand = (leaf.detach().double().requires_grad_() for leaf in leaves)
    reference = weighted_bag_reference if operator is weighted_bag else row_dot_reference
    output = reference(table, case.indices, operand)
    output.backward(upstream.double())
    return output.detach(), operand.grad, table.grad


def upstream_of(operator, case: Case) -> Tensor:
    return (case.x if operator is weighted_bag else case.weights).detach()


@pytest.mark.parametrize("pattern", ["random", "one row"])
@pytest.mark.parametrize("shape", [*SHAPES[:4], SMALL], ids=str)
@pytest.mark.parametrize("operator", [weighted_bag, row_dot])
def test_gradients_equal_definition(small_slabs, poisoned, operator, shape, pattern):
    case = small_case(shape, torch.float32, pattern)
    upstream = upstream_of(operator, case)
    ours = run(operator, case, upstream)
    for tensor, golden in zip(ours, exact(operator, case, upstream), strict=True):
        assert_close_to_exact(tensor, golden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("operator", [weighted_bag, row_dot])
def test_gradients_of_half_precision(operator, dtype):
    case = small_case(SMALL, dtype)
    upstream = upstream_of(operator, case)
    ours = run(operator, case, upstream)
    assert [tensor.dtype for tensor in ours] == [dtype] * 3
    for tensor, golden in zip(ours, exact(operator, case, upstream), strict=True):
        assert_close_to_exact(tensor, golden)


@pytest.mark.parametrize("shape", [SMALL, SEVERAL_BLOCKS], ids=str)
@pytest.mark.parametrize("operator", [weighted_bag, row_dot])
def test_all_forms_hold_the_same_bits(small_slabs, poisoned, operator, shape):
    case = small_case(shape)
    upstream = upstream_of(operator, case)
    dense, *others = (run(operator, case, upstream, form) for form in FORMS)
    for other in others:
        for tensor, expected in zip(other, dense, strict=True):
            assert torch.equal(tensor, expected)


def test_a_bf16_tables_gradient_in_fp32_is_not_rounded():
    case = small_case(dtype=torch.bfloat16)
    upstream = upstream_of(weighted_bag, case)
    golden = exact(weighted_bag, case, upstream)[2]
    for form in ("main_grad", "rows"):
        gradient = run(weighted_bag, case, upstream, form)[2]
        torch.testing.assert_close(gradient.double(), golden, rtol=1e-5, atol=1e-6)


def test_row_gradients_may_be_bf16_and_their_norms_are_not_rounded():
    case = small_case()
    exact_sums = exact(weighted_bag, case, case.x)[2]
    held = RowGradients.empty(case.table, case.indices.numel(), torch.bfloat16)
    weighted_bag(case.table, case.indices, case.weights, row_gradients=held).backward(case.x)
    held = held.trimmed()
    assert_close_to_exact(held.gradients, exact_sums[held.rows])
    norms = exact_sums[held.rows].square().sum(-1)
    torch.testing.assert_close(held.squared_norms.double(), norms, rtol=1e-5, atol=0)


RUNS = [
    [1, 3, 4, 5, 8, 1, 9, 2, 12, 13],  # around one and several slabs of four reads
    [40, 1, 1],  # begins with its slab; groups of slabs lie within
    [2, 47, 3],  # begins and ends within a slab
    [4, 4, 4, 8, 16],  # ends where slabs end
    [3, 12, 37],  # the last read of all is of a long row
    [60],
]


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_rows_of_any_number_of_reads_are_exact(small_slabs, poisoned, number: int):
    """Small integers: every sum is exact, so a read left out or taken twice shows."""
    generator = torch.Generator().manual_seed(5)
    runs, form = RUNS[number], FORMS[number % 3]
    rows = torch.arange(len(runs)).repeat_interleave(torch.tensor(runs)) * 2 + 1
    indices = rows[torch.randperm(len(rows), generator=generator)]
    if len(rows) % 2 == 0:  # two reads a token, in half of the cases
        indices = indices.view(-1, 2)
    else:
        indices = indices[:, None]

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float().to(TEST_DEVICE)

    case = Case(
        table=integers(2 * len(runs) + 1, 3),
        indices=indices.to(TEST_DEVICE),
        weights=integers(*indices.shape),
        x=integers(len(indices), 3),
        gate=integers(len(indices), 3),
    )
    golden = exact(weighted_bag, case, case.x)
    for tensor, expected in zip(run(weighted_bag, case, case.x, form), golden, strict=True):
        assert torch.equal(tensor.double(), expected)


def test_power_law(small_slabs, monkeypatch):
    """Few rows with most of the reads, and many with one, over several blocks of columns."""
    monkeypatch.setattr(triton_backward, "_BYTES_A_LANE", 1)
    case = small_case(Shape(tokens=21, bag=4, rows=100, columns=7))
    ranks = torch.linspace(0, 1, case.indices.numel(), device=TEST_DEVICE) ** 4
    order = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(5))
    rows = (ranks * 99).int()[order.to(TEST_DEVICE)].view(case.indices.shape)
    case = Case(**dict(vars(case), indices=rows))
    ours = run(weighted_bag, case, case.x.detach())
    for tensor, golden in zip(ours, exact(weighted_bag, case, case.x.detach()), strict=True):
        assert_close_to_exact(tensor, golden)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_are_one_table(form: str):
    case = small_case()
    whole = run(weighted_bag, case, case.x, form)
    chunks = case.table.detach().split(15)
    for tensor, expected in zip(run(weighted_bag, case, case.x, form, chunks), whole, strict=True):
        assert torch.equal(tensor, expected)
    case = Case(**dict(vars(case), indices=case.indices.long()))
    h, *_ = run(row_dot, case, case.weights, form, chunks)
    assert torch.equal(h, run(row_dot, case, case.weights)[0])


@pytest.mark.parametrize("operator", [weighted_bag, row_dot])
def test_fp8_values_are_read_in_the_tables_place(operator):
    case = small_case(dtype=torch.bfloat16)
    upstream = upstream_of(operator, case)
    chunks = [chunk.clone() for chunk in case.table.detach().split(15)]
    shadow = Fp8Shadow.of(chunks)
    values = dequantize_rows(torch.cat(shadow.values), shadow.scales)
    golden = exact(operator, case, upstream, values)
    for tensor, expected in zip(
        run(operator, case, upstream, table=chunks, shadow=shadow), golden, strict=True
    ):
        assert_close_to_exact(tensor, expected)


def test_a_table_of_2_to_the_31_rows_or_more_is_sorted_in_int64(small_slabs, monkeypatch):
    case = small_case(pattern="one row")
    expected = run(weighted_bag, case, case.x, "rows")
    monkeypatch.setattr(triton_backward, "num_rows", lambda chunks: 2**31)
    for tensor, same in zip(run(weighted_bag, case, case.x, "rows"), expected, strict=True):
        assert torch.equal(tensor, same)


def test_main_grad_accumulates_and_unread_rows_keep_their_bits(small_slabs):
    """NaN with a payload stands in rows that nobody reads: even adding zero to one would show."""
    case = small_case()
    gradient = run(weighted_bag, case, case.x)[2]
    unread = torch.ones(SMALL.rows, dtype=torch.bool, device=TEST_DEVICE)
    unread[case.indices.flatten().long()] = False
    start = torch.randn(gradient.shape, device=TEST_DEVICE)
    payload = torch.arange(int(unread.sum()) * SMALL.columns, dtype=torch.int32) + 0x7F800001
    start[unread] = payload.view(-1, SMALL.columns).view(torch.float32).to(TEST_DEVICE)
    main_grad = start.clone()
    for times in (1, 2):
        y = weighted_bag(case.table, case.indices, case.weights, main_grad=main_grad)
        y.backward(case.x)
        bits, before = main_grad.view(torch.int32), start.view(torch.int32)
        assert torch.equal(bits[unread], before[unread])
        expected = start[~unread] + gradient[~unread]
        if times == 2:
            expected += gradient[~unread]
        assert torch.equal(main_grad[~unread], expected)


def test_two_runs_give_the_same_bits(small_slabs):
    case = small_case(pattern="one row")
    first, second = (run(weighted_bag, case, case.x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_value_that_is_no_number_stays_in_its_row(small_slabs):
    """Of a token with infinite and undefined gradients, in the rows that it reads and no other."""
    case = small_case()
    case = Case(**dict(vars(case), weights=case.weights.detach().abs()))
    upstream = case.x.detach().clone()
    upstream[3, 0], upstream[3, 1] = torch.inf, torch.nan
    gradient = run(weighted_bag, case, upstream)[2]
    clean = run(weighted_bag, case, case.x)[2]
    touched = case.indices[3].unique().long()
    assert torch.equal(gradient[touched, 0].abs(), torch.full_like(clean[touched, 0], torch.inf))
    assert gradient[touched, 1].isnan().all()
    gradient[touched, :2] = clean[touched, :2]
    assert torch.equal(gradient, clean)


@pytest.mark.parametrize("where", ["weights", "x"])
def test_infinity_in_the_last_of_an_odd_number_of_reads(where: str):
    """Reads are taken two at a time: what stands in for a missing one adds nothing, not inf * 0."""
    tensors = dict(table=torch.ones(1, 2), weights=torch.ones(3, 1), x=torch.ones(3, 2))
    tensors[where][2] = torch.inf
    indices = torch.zeros(3, 1, dtype=torch.int32)
    case = Case(indices=indices, gate=tensors["x"], **tensors).to(TEST_DEVICE)
    _, grad_weights, gradient = run(weighted_bag, case, case.x)
    assert torch.equal(gradient, torch.full_like(gradient, torch.inf))
    assert torch.equal(grad_weights, case.x.sum(1, keepdim=True))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_only_the_weights_gradient(gated: bool):
    """A frozen table: the dots alone, by the kernel of row_dot."""
    case = small_case()
    gate = torch.ones_like(case.gate) if gated else None
    table = case.table.detach()
    weighted_bag(table, case.indices, case.weights, gate).backward(case.x)
    silu = 0.7310585786300049 if gated else 1.0
    golden = row_dot_reference(table.double(), case.indices, case.x.double()) * silu
    assert_close_to_exact(case.weights.grad, golden)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(dtype):
    """As the torch path, which rounds in the same places."""
    case = small_case(dtype=dtype)
    sums, gate, grad = case.table[:7], case.gate, case.x
    gradients = torch.ops.memory_kernels.gate_backward(grad, sums.T.contiguous().T, gate)
    s, g = (each.detach().double().requires_grad_() for each in (sums, gate))
    (s * torch.nn.functional.silu(g)).backward(grad.double())
    for tensor, golden in zip(gradients, (s.grad, g.grad), strict=True):
        assert tensor.dtype == dtype
        assert_close_to_exact(tensor, golden)


@pytest.mark.parametrize("tokens, bag", [(0, 4), (3, 0), (0, 0)])
def test_empty_input(tokens: int, bag: int):
    case = make_case(Shape(tokens=tokens, bag=bag, rows=5, columns=3)).to(TEST_DEVICE)
    held = RowGradients.empty(case.table, 8)
    held.num_rows.fill_(7)
    y = weighted_bag(case.table, case.indices, case.weights, case.gate, row_gradients=held)
    y.sum().backward()
    assert int(held.num_rows) == 0
    main_grad = torch.zeros_like(case.table)
    h = row_dot(case.table, case.indices, case.x, main_grad=main_grad)
    (h.sum() + weighted_bag(case.table, case.indices, case.weights).sum()).backward()
    assert not main_grad.any()
    assert not case.table.grad.any()
    assert case.weights.grad.shape == (tokens, bag)
    assert torch.equal(case.x.grad, torch.zeros_like(case.x))


@pytest.mark.parametrize("form", FORMS)
def test_table_without_columns(form: str, small_slabs):
    case = small_case(Shape(tokens=7, bag=5, rows=3, columns=0))
    y, grad_weights, gradient = run(weighted_bag, case, case.x.detach(), form)
    assert y.shape == (7, 0) and gradient.shape == (3, 0)
    assert torch.equal(grad_weights, torch.zeros_like(grad_weights))
    h, grad_x, gradient = run(row_dot, case, case.weights.detach(), form)
    assert torch.equal(h, torch.zeros_like(h))
    assert grad_x.shape == (7, 0) and gradient.shape == (3, 0)


def test_merged_row_gradients_are_the_sum(small_slabs):
    case = small_case()
    parts, total = [], torch.zeros_like(case.table)
    for tokens in (slice(0, 4), slice(2, 7)):
        held = RowGradients.empty(case.table, case.indices[tokens].numel())
        for options in (dict(row_gradients=held), dict(main_grad=total)):
            y = weighted_bag(case.table, case.indices[tokens], case.weights[tokens], **options)
            y.backward(case.x[tokens].detach())
        parts.append(held)
    merged = merge_row_gradients(parts)
    torch.testing.assert_close(densified(merged, SMALL.rows), total.detach(), rtol=1e-6, atol=1e-6)


def test_merged_rows_of_a_table_beyond_int32():
    """What is merged has few rows, whatever the table they are of."""
    ones = torch.ones(2, 3, device=TEST_DEVICE)
    parts = [
        RowGradients(
            rows=torch.tensor(rows, device=TEST_DEVICE),
            gradients=ones,
            squared_norms=ones.square().sum(-1),
            num_rows=torch.tensor([2], dtype=torch.int32, device=TEST_DEVICE),
        )
        for rows in ([5, 2**31 + 3], [5, 2**32 + 5])
    ]
    merged = merge_row_gradients(parts).trimmed()
    assert merged.rows.tolist() == [5, 2**31 + 3, 2**32 + 5]
    assert merged.gradients.tolist() == [[2.0] * 3, [1.0] * 3, [1.0] * 3]
