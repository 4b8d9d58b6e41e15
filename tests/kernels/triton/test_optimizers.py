"""The row-sparse optimizers' kernels against the torch path, which tests/kernels/optimizers
compares with torch's own optimizers."""

import pytest
import torch
import triton
import triton.language as tl

from memory_kernels import Fp8Shadow, choice
from memory_kernels.optimizers import RowAdagrad, RowAdam, RowSGD, RowWiseAdagrad, triton_weights
from memory_kernels.optimizers.precision import random_bits, split_master
from memory_kernels.optimizers.triton_weights import (
    load_weights,
    random_16_bits,
    store_weights,
)
from tests.devices import TEST_DEVICE
from tests.kernels.optimizers.cases import make_generator, make_gradient, make_table

OPTIMIZERS = [RowSGD, RowAdagrad, RowWiseAdagrad, RowAdam]
ROWS = 7
PRECISIONS = {
    "fp32": (torch.float32, None),
    "exact": (torch.bfloat16, "exact"),
    "stochastic": (torch.bfloat16, "stochastic"),
    "nearest": (torch.bfloat16, None),
}


def _train(kind: str, optimizer, table, chunk: int, gradient_dtype=None, shadow=True, **options):
    """Four steps on some rows, the first of which are clipped; what is left of them all."""
    choice.use_kernels(kind)
    chunks = [part.clone() for part in table.split(chunk)]
    follower = Fp8Shadow.of(chunks) if shadow else None
    opt = optimizer([{"params": chunks, "shadow": follower}], lr=0.125, **options)
    generator = make_generator()
    for number in range(4):
        gradient = make_gradient(table, 3, generator, gradient_dtype)
        if optimizer is RowAdam and number % 2:
            opt.prepare(gradient.rows[:3].repeat(2))
        opt.step(gradient, max_norm=1.5 if number < 2 else None)
    if optimizer is RowAdam:
        opt.flush()
    choice.use_kernels("triton")
    states = [
        torch.cat([opt.state[part][name] for part in chunks])
        for name in opt.state[chunks[0]]
        if name not in ("history", "log_decay", "remainder")
    ]
    codes = torch.cat(follower.bytes()) if shadow else None
    scales = follower.scales if shadow else None
    return torch.cat(opt.master_weights()), torch.cat(chunks), states, codes, scales


def _assert_same(ours, wanted, before) -> None:
    """Masters and states apart by a few roundings in fp32 (moments in bf16: of those)."""
    assert not torch.equal(wanted[1], before)
    unit = torch.finfo(torch.float32).eps
    if wanted[1].dtype == torch.bfloat16 and not torch.equal(wanted[0], wanted[1].float()):
        torch.testing.assert_close(ours[0], wanted[0], rtol=16 * unit, atol=16 * unit)
    tolerance = 16 * unit if wanted[1].dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours[1], wanted[1], rtol=tolerance, atol=tolerance)
    # A value on the edge may be rounded the other way; most have the same bits.
    if wanted[1].dtype == torch.bfloat16:
        assert (ours[1] != wanted[1]).double().mean() < 0.02
    for state, theirs in zip(ours[2], wanted[2], strict=True):
        spacing = 16 * unit if state.dtype != torch.bfloat16 else 2**-7
        torch.testing.assert_close(state, theirs, rtol=spacing, atol=spacing)


CASES = [(optimizer, kind, 130, 3) for optimizer in OPTIMIZERS for kind in PRECISIONS]
NARROW = [(o, kind, 3, ROWS) for o, kind in zip(OPTIMIZERS, reversed(PRECISIONS), strict=True)]


@pytest.mark.parametrize("optimizer, kind, columns, chunk", CASES + NARROW)
def test_kernels_are_the_torch_path(optimizer, kind, columns, chunk):
    dtype, master = PRECISIONS[kind]
    table = make_table(ROWS, columns, dtype)
    ours = _train("triton", optimizer, table, chunk, master=master)
    _assert_same(ours, _train("torch", optimizer, table, chunk, master=master), table)
    shadow = Fp8Shadow.of(ours[1])
    assert torch.equal(ours[3], shadow.bytes()[0])
    assert torch.equal(ours[4], shadow.scales)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_wide_rows_are_several_blocks(optimizer, monkeypatch):
    """As rows above 4096 columns are; their shadow is a second launch's."""
    monkeypatch.setattr(triton_weights, "_LARGEST_BLOCK", 16)
    table = make_table(ROWS, 37, torch.bfloat16)
    ours = _train("triton", optimizer, table, 4)
    _assert_same(ours, _train("torch", optimizer, table, 4), table)
    shadow = Fp8Shadow.of(ours[1])
    assert torch.equal(ours[3], shadow.bytes()[0])
    assert torch.equal(ours[4], shadow.scales)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_master_trains_as_fp32_does(optimizer):
    """Bit for bit, on the kernels alone."""
    table = make_table(ROWS, 9, torch.bfloat16)
    low = _train("triton", optimizer, table, ROWS, gradient_dtype=torch.float32, shadow=False)
    full = _train("triton", optimizer, table.float(), ROWS, shadow=False)
    assert torch.equal(low[0], full[1])
    assert torch.equal(low[1], split_master(full[1])[0])


def test_bf16_moments_and_gradients():
    table = make_table(ROWS, 20, torch.bfloat16)
    options = dict(gradient_dtype=torch.bfloat16, moments_dtype=torch.bfloat16, eps=0.1)
    ours = _train("triton", RowAdam, table, 4, **options)
    wanted = _train("torch", RowAdam, table, 4, **options)
    # A moment rounded the other way moves the weight by its unit in the last place.
    torch.testing.assert_close(ours[0], wanted[0], rtol=2**-8, atol=2**-8)
    for state, theirs in zip(ours[2], wanted[2], strict=True):
        torch.testing.assert_close(state, theirs, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("options", [dict(), dict(betas=(0.0, 0.5)), dict(betas=(0.6, 0.7))])
def test_long_catch_up(options):
    """More missed steps than are gone through one by one, with rates that change."""
    tables = [make_table(5, 6) for _ in range(2)]
    for kind, table in zip(("triton", "torch"), tables, strict=True):
        choice.use_kernels(kind)
        optimizer = RowAdam([table], weight_decay=0.25, **options)
        generator = make_generator()
        for number in range(60 if options else 20):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + number % 3)
            optimizer.step(make_gradient(table, 2, generator) if number in (0, 1) else None)
        optimizer.prepare(torch.tensor([[4, 1], [1, 0]], dtype=torch.int32, device=TEST_DEVICE))
        optimizer.flush()
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_rows_keep_their_bits(optimizer):
    """NaN stands in all that belongs to rows which are not read, and in spare entries."""
    table = make_table(ROWS, 5, torch.bfloat16)
    shadow = Fp8Shadow.of(table)
    opt = optimizer([{"params": [table], "shadow": shadow}])
    read = torch.tensor([0, 2, 6], device=TEST_DEVICE)
    unread = torch.ones(ROWS, dtype=torch.bool, device=TEST_DEVICE)
    unread[read] = False
    tensors = [table, *shadow.bytes(), shadow.scales, *opt.state[table].values()]
    tensors = [tensor for tensor in tensors if tensor.shape[:1] == (ROWS,)]
    for tensor in tensors:
        if tensor.dtype != torch.int32:
            tensor[unread] = torch.nan if tensor.is_floating_point() else 77
    before = [tensor.clone() for tensor in tensors]
    gradient = make_gradient(table, 3, make_generator())
    gradient.rows[:3] = read
    opt.step(gradient)
    if optimizer is RowAdam:
        opt.step(None)
        opt.prepare(read)
    for tensor, old in zip(tensors, before, strict=True):
        same = tensor.view(torch.uint8).view(ROWS, -1) == old.view(torch.uint8).view(ROWS, -1)
        assert same[unread].all()
    assert not table[read].isnan().any()
    assert not torch.equal(table[read], before[0][read])


@triton.jit
def _draw(out, seed, step, row, BLOCK: tl.constexpr):
    bits = random_16_bits(seed, tl.load(step), tl.load(row), 8, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), bits)


@pytest.mark.parametrize("seed", [0, 5, 2**33 + 1])
def test_random_bits_are_those_of_the_torch_path(seed: int):
    out = torch.empty(16, dtype=torch.int32, device=TEST_DEVICE)
    row = torch.tensor([2**31 - 9], device=TEST_DEVICE)
    step = torch.tensor([3], dtype=torch.int32, device=TEST_DEVICE)
    _draw[(1,)](out, seed, step, row, BLOCK=16)
    assert torch.equal(out, random_bits(seed, 3, row, 24)[0, 8:])


@triton.jit
def _split_and_join(table, remainder, joined, values, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    every = offsets < BLOCK
    store_weights(
        table + offsets,
        remainder + offsets,
        tl.load(values + offsets),
        every,
        0,
        0,
        0,
        0,
        "exact",
        BLOCK,
    )
    tl.debug_barrier()
    tl.store(joined + offsets, load_weights(table + offsets, remainder + offsets, every, "exact"))


def test_exact_master_at_the_edges():
    """Largest numbers, infinities, denormals, ties, and NaN of any bits: those GPUs make too."""
    bits = [0, 1, 0x8000, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001, 0x3F808000]
    both = torch.tensor([*bits, *(b - 2**31 for b in bits)], dtype=torch.int32, device=TEST_DEVICE)
    values = both.view(torch.float32)
    table = torch.empty(16, dtype=torch.int16, device=TEST_DEVICE)
    remainder = torch.empty(16, dtype=torch.int16, device=TEST_DEVICE)
    joined = torch.empty(16, device=TEST_DEVICE)
    _split_and_join[(1,)](table, remainder, joined, values, BLOCK=16)
    wanted, wanted_remainder = split_master(values)
    assert torch.equal(table, wanted.view(torch.int16))
    assert torch.equal(remainder, wanted_remainder)
    number = ~values.isnan()
    assert torch.equal(joined[number].view(torch.int32), both[number])
    assert joined[~number].isnan().all()
    assert table.view(torch.bfloat16)[~number].isnan().all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradients_that_hold_nothing_change_nothing(optimizer):
    table = make_table(ROWS, 5)
    before = table.clone()
    opt = optimizer([table])
    opt.step(make_gradient(table, 0, make_generator()), max_norm=1.0)
    opt.step(make_gradient(table, 0, make_generator(), spare=0))
    assert torch.equal(table, before)
