"""The table gradient that is added to a given buffer, and that two runs give the same bits."""

import pytest
import torch

from memory_kernels import product_key_topk, row_dot, weighted_bag
from memory_kernels.bag import torch_ops
from memory_kernels.bag.torch_ops import row_gradients
from tests.kernels.bag_cases import INDEX_DTYPES, SHAPES, Shape, make_case

OPERATORS = {"weighted_bag": (weighted_bag, "weights"), "row_dot": (row_dot, "x")}
MANY_TOKENS = Shape(tokens=257, bag=32, rows=50, columns=100)


def _run(operator: str, case, main_grad: torch.Tensor | None):
    """Output, gradient of the other operand, and what autograd has for the table."""
    function, name = OPERATORS[operator]
    table = case.table.detach().clone().requires_grad_()
    operand = getattr(case, name).detach().clone().requires_grad_()
    output = function(table, case.indices, operand, main_grad=main_grad)
    output.backward(torch.cos(torch.arange(output.numel()).view(output.shape)).to(output.dtype))
    return output.detach(), operand.grad, table.grad


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("pattern", ["random", "one row", "same bag"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_main_grad_takes_the_dense_gradient(operator, shape, pattern, index_dtype):
    case = make_case(shape, torch.float32, index_dtype, pattern)
    output, operand_grad, dense = _run(operator, case, None)
    main_grad = torch.zeros(shape.rows, shape.columns)
    same_output, same_operand_grad, from_autograd = _run(operator, case, main_grad)
    assert from_autograd is None
    assert torch.equal(output, same_output)
    assert torch.equal(operand_grad, same_operand_grad)
    assert torch.equal(main_grad, dense)
    assert dense.any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_main_grad_accumulates(operator: str):
    case = make_case(SHAPES[3])
    _, _, dense = _run(operator, case, None)
    start = torch.randn_like(dense)
    main_grad = start.clone()
    _run(operator, case, main_grad)
    assert torch.equal(main_grad, start + dense)
    _run(operator, case, main_grad)
    assert torch.equal(main_grad, start + dense + dense)


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_not_read_keep_their_bits(operator: str):
    """NaN with a payload stands in rows that nobody reads: even adding zero to one would show."""
    case = make_case(Shape(tokens=6, bag=3, rows=40, columns=5))
    unread = torch.ones(40, dtype=torch.bool)
    unread[case.indices.flatten()] = False
    main_grad = torch.zeros(40, 5)
    payload = torch.arange(int(unread.sum()) * 5, dtype=torch.int32).view(-1, 5) + 0x7F800001
    main_grad[unread] = payload.view(torch.float32)
    before = main_grad.view(torch.int32).clone()
    _, _, dense = _run(operator, case, None)
    _run(operator, case, main_grad)
    assert torch.equal(main_grad.view(torch.int32)[unread], before[unread])
    assert torch.equal(main_grad[~unread], dense[~unread])


@pytest.mark.parametrize("operator", OPERATORS)
def test_bf16_gradients_reach_an_fp32_main_grad_unrounded(operator: str):
    case = make_case(SHAPES[4], torch.bfloat16)
    exact_case = make_case(SHAPES[4], torch.bfloat16).exact()
    main_grad = torch.zeros(SHAPES[4].rows, SHAPES[4].columns)
    output, _, _ = _run(operator, case, main_grad)
    function, name = OPERATORS[operator]
    exact = function(exact_case.table, case.indices, getattr(exact_case, name))
    upstream = torch.cos(torch.arange(output.numel()).view(output.shape)).bfloat16().double()
    exact.backward(upstream)
    # Products of two bf16 numbers are exact in fp32 and a row has few reads; bf16 sums would be off
    # by 4e-3.
    torch.testing.assert_close(main_grad.double(), exact_case.table.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_gradient_is_made_for_what_needs_none(operator: str):
    case = make_case(SHAPES[1])
    function, name = OPERATORS[operator]
    operand = getattr(case, name).detach().requires_grad_()
    function(case.table.detach(), case.indices, operand).sum().backward()
    assert operand.grad is not None
    function(case.table, case.indices, operand.detach()).sum().backward()
    assert case.table.grad is not None
    assert not function(case.table.detach(), case.indices, operand.detach()).requires_grad


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["random", "one row"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_two_runs_give_the_same_bits(two_threads, operator: str, pattern: str, dtype):
    case = make_case(MANY_TOKENS, dtype, torch.int32, pattern)
    first, second = _run(operator, case, None), _run(operator, case, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_of_a_rows_reads_is_the_tokens_order(two_threads):
    """Sums depend on their order: it must be the tokens', on any number of threads."""
    case = make_case(MANY_TOKENS, torch.float32, torch.int32)
    x, weights = case.x.detach(), torch.ones_like(case.weights)  # nothing but additions
    rows, sums = row_gradients(case.indices, weights, x)
    assert torch.equal(rows.long(), case.indices.long().unique())
    in_order = torch.zeros(MANY_TOKENS.rows, MANY_TOKENS.columns)
    for token, bag in enumerate(case.indices.tolist()):
        for row in bag:
            in_order[row] += x[token]
    assert torch.equal(sums, in_order[rows.long()])


@pytest.mark.parametrize("part_bytes", [1, 1000, 2**14])
def test_parts_of_any_size_give_the_same_bits(monkeypatch, part_bytes: int):
    case = make_case(MANY_TOKENS, torch.float32, torch.int32)
    whole = row_gradients(case.indices, case.weights.detach(), case.x.detach())
    _, _, dense = _run("weighted_bag", case, None)
    monkeypatch.setattr(torch_ops, "_PART_BYTES", part_bytes)
    parts = row_gradients(case.indices, case.weights.detach(), case.x.detach())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    main_grad = torch.zeros(MANY_TOKENS.rows, MANY_TOKENS.columns)
    _run("weighted_bag", case, main_grad)
    assert torch.equal(main_grad, dense)


def test_retrieval_gives_the_same_bits_twice(two_threads):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(257, 4, 64, generator=generator, requires_grad=True)
    keys = torch.randn(4, 2, 100, 32, generator=generator, requires_grad=True)
    results = []
    for _ in range(2):
        indices, weights = product_key_topk(query, keys, 32)
        gradients = torch.autograd.grad((weights * weights).sum(), (query, keys))
        results.append((indices, weights.detach(), *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("operator", [weighted_bag, row_dot])
def test_main_grad_without_another_gradient(operator):
    """A constant operand, as with a frozen router: the table still gets its gradient."""
    table = torch.randn(10, 4, requires_grad=True)
    indices = torch.tensor([[1, 1, 7]])
    operand = torch.ones(1, 3 if operator is weighted_bag else 4)
    main_grad = torch.zeros(10, 4)
    operator(table, indices, operand, main_grad=main_grad).sum().backward()
    expected = torch.zeros(10, 4)
    expected[1], expected[7] = 2.0, 1.0
    assert torch.equal(main_grad, expected)
