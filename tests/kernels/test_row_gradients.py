"""RowGradients: what backward fills them with, and what they give."""

import pytest
import torch

from memory_kernels import RowGradients, merge_row_gradients, row_dot, weighted_bag
from memory_kernels.bag.reads import sort_reads
from tests.kernels.bag_cases import INDEX_DTYPES, SHAPES, Shape, make_case

OPERATORS = {"weighted_bag": (weighted_bag, "weights"), "row_dot": (row_dot, "x")}


def _both(operator: str, case, dtype=torch.float32):
    """The filled buffers, and the dense gradient of the same call."""
    function, name = OPERATORS[operator]
    table = case.table.detach().requires_grad_()
    operand = getattr(case, name).detach().requires_grad_()
    held = RowGradients.empty(table, case.indices.numel(), dtype)
    output = function(table, case.indices, operand, row_gradients=held)
    upstream = torch.cos(torch.arange(output.numel())).view(output.shape).to(output.dtype)
    output.backward(upstream)
    assert table.grad is None
    filled_grad, operand.grad = operand.grad, None
    function(table, case.indices, operand).backward(upstream)
    assert torch.equal(operand.grad, filled_grad)
    return held, table.grad


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["random", "one row"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_rows_read_and_their_gradients(operator, shape, pattern, index_dtype):
    case = make_case(shape, torch.float32, index_dtype, pattern)
    held, dense = _both(operator, case)
    rows = held.trimmed()
    assert torch.equal(rows.rows, case.indices.long().unique())
    assert torch.equal(rows.gradients, dense[rows.rows])
    norms = dense[rows.rows].square().sum(-1)
    torch.testing.assert_close(rows.squared_norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(held.norm(), dense.norm())


def test_norms_are_those_of_the_gradients_before_they_are_rounded():
    case = make_case(SHAPES[4])
    held, dense = _both("weighted_bag", case, torch.bfloat16)
    rows = held.trimmed()
    assert rows.gradients.dtype == torch.bfloat16
    assert torch.equal(rows.gradients, dense[rows.rows].bfloat16())
    norms = dense[rows.rows].square().sum(-1)
    torch.testing.assert_close(rows.squared_norms, norms, rtol=1e-5, atol=0)


def test_no_more_room_than_the_table_has_rows():
    case = make_case(SHAPES[3])  # 30 reads of 4 rows
    held = RowGradients.empty(case.table, case.indices.numel())
    assert len(held.rows) == SHAPES[3].rows
    weighted_bag(case.table, case.indices, case.weights, row_gradients=held).sum().backward()
    assert int(held.num_rows) == len(case.indices.unique())


def test_entries_beyond_the_rows_read_do_not_count():
    case = make_case(SHAPES[1])
    held = RowGradients.empty(case.table, case.indices.numel())
    for buffer in (held.gradients, held.squared_norms):
        buffer.fill_(torch.nan)
    weighted_bag(case.table, case.indices, case.weights, row_gradients=held).sum().backward()
    assert int(held.num_rows) < len(held.rows)
    assert held.norm().isfinite()
    assert held.to_sparse(case.table).to_dense().isfinite().all()


def test_rows_of_chunks_are_counted_over_all_of_them():
    case = make_case(SHAPES[4])
    whole, _ = _both("weighted_bag", case)
    chunks = list(case.table.detach().split(300))
    held = RowGradients.empty(chunks, case.indices.numel())
    y = weighted_bag(chunks, case.indices, case.weights, row_gradients=held)
    y.backward(torch.cos(torch.arange(y.numel())).view(y.shape))
    for ours, same in zip(held.trimmed().buffers(), whole.trimmed().buffers(), strict=True):
        assert torch.equal(ours, same)


def test_the_sparse_tensor_steps_torchs_sparse_adam():
    case = make_case(Shape(tokens=9, bag=4, rows=50, columns=6))
    held, dense = _both("weighted_bag", case)
    sparse = held.to_sparse(case.table)
    assert sparse.is_coalesced()
    assert torch.equal(sparse.to_dense(), dense)
    ours, theirs = (torch.nn.Parameter(case.table.detach().clone()) for _ in range(2))
    ours.grad = sparse
    theirs.grad = dense.to_sparse(1).coalesce()
    for parameter in (ours, theirs):
        torch.optim.SparseAdam([parameter], lr=0.1).step()
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, case.table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_gradients_are_the_sum(dtype):
    case = make_case(Shape(tokens=12, bag=4, rows=30, columns=6))
    parts, total = [], torch.zeros(30, 6)
    for tokens in (slice(0, 3), slice(3, 8), slice(8, 12)):
        arguments = case.table, case.indices[tokens], case.weights[tokens]
        held = RowGradients.empty(case.table, arguments[1].numel(), dtype)
        weighted_bag(*arguments, row_gradients=held).sum().backward()
        parts.append(held)
        rounded = held.trimmed()
        total.index_add_(0, rounded.rows, rounded.gradients.float())
    merged = merge_row_gradients(parts)
    assert merged.gradients.dtype == dtype
    rows = merged.trimmed()
    assert torch.equal(rows.rows, case.indices.unique())
    torch.testing.assert_close(rows.gradients, total[rows.rows].to(dtype))
    norms = total[rows.rows].square().sum(-1)
    torch.testing.assert_close(rows.squared_norms, norms)
    torch.testing.assert_close(merged.norm(), total.norm())
    assert merge_row_gradients(parts[:1]) is parts[0]


def test_too_many_reads_are_refused():
    indices = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)
    with pytest.raises(ValueError, match=r"indices: fewer than 2\^31 reads"):
        sort_reads(indices, 10)


def test_parts_without_a_row_add_nothing():
    table = torch.zeros(5, 3)
    merged = merge_row_gradients([RowGradients.empty(table, 0), RowGradients.empty(table, 4)])
    assert int(merged.num_rows) == 0
    assert merged.norm() == 0


@pytest.mark.parametrize("rows, columns", [(4, 3), (5, 2)])
def test_buffers_without_room_are_refused(rows: int, columns: int):
    case = make_case(SHAPES[1])
    small = RowGradients.empty(torch.empty(9, columns), rows)
    with pytest.raises(ValueError, match=r"^row_gradients: room for 5 rows of 3 columns wanted"):
        weighted_bag(case.table, case.indices, case.weights, row_gradients=small)


def test_one_destination_only():
    case = make_case(SHAPES[1])
    held = RowGradients.empty(case.table, 5)
    with pytest.raises(ValueError, match=r"^main_grad and row_gradients: one destination"):
        weighted_bag(
            case.table,
            case.indices,
            case.weights,
            main_grad=torch.zeros_like(case.table),
            row_gradients=held,
        )


def test_buffers_on_another_device_are_refused():
    case = make_case(SHAPES[1])
    elsewhere = case.table.detach().to("meta")
    for name, sink in (
        ("main_grad", dict(main_grad=elsewhere)),
        ("row_gradients", dict(row_gradients=RowGradients.empty(elsewhere, 5))),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: on cpu wanted, as the table, got meta"):
            weighted_bag(case.table, case.indices, case.weights, **sink)
