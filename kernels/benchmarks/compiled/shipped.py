"""Every launch that ships: the Triton implementations called with tensors of the meta device.

Shapes are those of the paper's models: 16k tokens a batch, four heads of 32 slots, tables of 1M
rows, values as wide as the model, and the slices of them that tensor parallelism leaves a rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.compiled.launches import Shipped, describe, meta, shipped_by
from memory_kernels import RowGradients, shadow_triton
from memory_kernels.bag import triton_ops as bag
from memory_kernels.optimizers import triton_ops as updates
from memory_kernels.peer import triton_ops as experts
from memory_kernels.product_key import triton_ops as product_key

TOKENS, HEADS, SLOTS, ROWS = 16 * 1024, 4, 32, 1024**2
READS = HEADS * SLOTS
MODEL_WIDTHS = (512, 768, 1024, 2048, 4096)
SLICE_WIDTHS = (64, 128, 256)
ODD_WIDTHS = (3, 100, 257)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UINT8, INT16, INT32, INT64 = torch.uint8, torch.int16, torch.int32, torch.int64


def shipped() -> list[Shipped]:
    """All of them, each once."""
    found: dict[str, Shipped] = {}
    for launches in (forward, dots, backward, gate, shadow, retrieval, optimizers, peer):
        for one in launches():
            other = found.setdefault(one.name, one)
            assert describe(other.launch) == describe(one.launch), f"two launches: {one.name}"
    return list(found.values())


def table_of(columns: int, dtype=BF16, *, rows: int = ROWS, chunks: int = 1) -> list[Tensor]:
    return [meta(rows // chunks, columns, dtype=dtype)] * chunks


def shadow_of(columns: int, *, chunks: int = 1) -> list[Tensor]:
    """As operators take it: fp8 values as bytes, then the scales."""
    return [*table_of(columns, UINT8, chunks=chunks), meta(ROWS, dtype=FP32)]


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def is_wide(columns: int, dtype=BF16) -> bool:
    """Whether rows must be read 16 bytes at a time: they fill a warp's lanes, also in fp8, and
    Triton sees that they are multiples of 16 bytes. Of an integer it knows no more than whether 16
    divides it."""
    return columns % 16 == 0 and columns * dtype.itemsize >= 1024


def forward() -> Iterator[Shipped]:
    def case(
        what: str,
        columns: int,
        dtype=BF16,
        *,
        main=False,
        gated=False,
        fp8=False,
        chunks=1,
        reads=READS,
        rows=ROWS,
        indices=INT32,
    ) -> Iterator[Shipped]:
        return shipped_by(
            lambda: bag.weighted_bag(
                table_of(columns, dtype, rows=rows, chunks=chunks),
                meta(TOKENS, reads, dtype=indices),
                meta(TOKENS, reads, dtype=FP32),
                meta(TOKENS, columns, dtype=dtype) if gated else None,
                shadow_of(columns, chunks=chunks) if fp8 else [],
            ),
            f"D={columns} {what}",
            main=main,
            wide=is_wide(columns, dtype),
        )

    for columns in (*SLICE_WIDTHS, *MODEL_WIDTHS):
        yield from case("bf16", columns, main=columns == 1024)
        yield from case("bf16 gated", columns, gated=True)
        yield from case("bf16 chunked", columns, chunks=8, main=columns == 1024)
        yield from case("fp8", columns, fp8=True)
        yield from case("fp8 gated", columns, fp8=True, gated=True, main=columns == 1024)
    for dtype in (FP32, FP16):
        yield from case(short(dtype), 1024, dtype, main=dtype == FP32)
    yield from case("fp8 chunked", 1024, fp8=True, chunks=8)
    yield from case("bf16 int64 indices", 1024, indices=INT64)
    yield from case("bf16 2^31 rows", 1024, rows=2**31, indices=INT64)
    for reads in (1, 32, 100):
        yield from case(f"bf16 B={reads}", 1024, reads=reads)
    for columns in ODD_WIDTHS:
        yield from case("bf16", columns, main=columns == 257)
        yield from case("fp32", columns, FP32)


def dots() -> Iterator[Shipped]:
    def case(
        what: str, columns: int, dtype=BF16, *, main=False, fp8=False, chunks=1, reads=READS
    ) -> Iterator[Shipped]:
        return shipped_by(
            lambda: bag.row_dot(
                table_of(columns, dtype, chunks=chunks),
                meta(TOKENS, reads, dtype=INT32),
                meta(TOKENS, columns, dtype=dtype),
                shadow_of(columns, chunks=chunks) if fp8 else [],
            ),
            f"D={columns} {what}",
            main=main,
            wide=is_wide(columns, dtype),
        )

    for columns in (*SLICE_WIDTHS, *MODEL_WIDTHS):
        yield from case("bf16", columns, main=columns == 1024)
        yield from case("fp8", columns, fp8=True, main=columns == 1024)
    yield from case("bf16 chunked", 1024, chunks=8, main=True)
    yield from case("fp32", 1024, FP32)
    yield from case("bf16 B=100", 1024, reads=100)
    for columns in ODD_WIDTHS:
        yield from case("bf16", columns, main=columns == 257)
        yield from case("fp32", columns, FP32)


def sinks_of(form: str, columns: int, chunks: int, sink_dtype: torch.dtype) -> list[Tensor]:
    """As operators take them."""
    if form == "rows":
        table = meta(ROWS, columns)
        return RowGradients.empty(table, TOKENS * READS, dtype=sink_dtype).buffers()
    return table_of(columns, sink_dtype, chunks=chunks)


def backward() -> Iterator[Shipped]:
    def case(
        what: str,
        columns: int,
        form: str,
        dtype=BF16,
        *,
        sink_dtype=None,
        main=False,
        fp8=False,
        chunks=1,
        with_dot=True,
        rows=ROWS,
        tokens=TOKENS,
    ) -> Iterator[Shipped]:
        sink_dtype = sink_dtype or (FP32 if form == "main_grad" else dtype)
        return shipped_by(
            lambda: bag.bag_backward(
                table_of(columns, dtype, rows=rows, chunks=chunks),
                meta(tokens, READS, dtype=INT32 if rows < 2**31 else INT64),
                meta(tokens, READS, dtype=FP32),
                meta(tokens, columns, dtype=dtype),
                shadow_of(columns, chunks=chunks) if fp8 else [],
                form,
                sinks_of(form, columns, chunks, sink_dtype),
                with_dot,
            ),
            f"D={columns} {what} {form}",
            main=main,
            wide=is_wide(columns, dtype),
        )

    alone, by_form = ["bag_backward"], ["bag_backward", "sum_pieces"]
    for columns in (*SLICE_WIDTHS, *MODEL_WIDTHS):
        yield from case("bf16", columns, "dense", main=alone if columns == 1024 else ())
        yield from case("bf16", columns, "main_grad", main=by_form if columns == 1024 else ())
        yield from case("bf16", columns, "rows", main=columns == 1024)
        yield from case("fp8", columns, "rows", fp8=True, main=alone if columns == 1024 else ())
    yield from case("bf16 chunked", 512, "dense", chunks=8)
    yield from case("bf16 chunked", 1024, "main_grad", chunks=8, main=by_form)
    yield from case("bf16 chunked", 2048, "rows", chunks=8)
    yield from case("bf16 fp32 gradient", 1024, "rows", sink_dtype=FP32)
    yield from case("bf16 no dots", 1024, "rows", with_dot=False)
    yield from case("bf16 2^31 rows", 1024, "main_grad", rows=2**31)
    yield from case("bf16 1 token", 1024, "rows", tokens=1)
    for dtype in (FP32, FP16):
        yield from case(short(dtype), 1024, "rows", dtype)
    for columns in ODD_WIDTHS:
        yield from case("bf16", columns, "rows", main=by_form if columns == 257 else ())
        yield from case("fp32", columns, "dense", FP32)


def gate() -> Iterator[Shipped]:
    for columns in (64, 257, 1024):
        for dtype in (BF16, FP32):
            operand = meta(TOKENS, columns, dtype=dtype)
            yield from shipped_by(
                lambda operand=operand: bag.gate_gradients(operand, operand, operand),
                f"D={columns} {short(dtype)}",
                main=columns == 1024 and dtype == BF16,
            )


def shadow() -> Iterator[Shipped]:
    def case(what: str, columns: int, dtype=BF16, *, main=False, chunks=1, some=False):
        capacity = TOKENS * READS
        return shipped_by(
            lambda: shadow_triton.plan_quantize_rows(
                table_of(columns, dtype, chunks=chunks),
                table_of(columns, UINT8, chunks=chunks),
                meta(ROWS, dtype=FP32),
                meta(capacity, dtype=INT64) if some else None,
                meta(1, dtype=INT32) if some else None,
            ).run(),
            f"D={columns} {what}",
            main=main,
            wide=is_wide(columns, dtype),
        )

    for columns in (*SLICE_WIDTHS, *MODEL_WIDTHS):
        yield from case("bf16 all rows", columns, main=columns == 1024)
        yield from case("bf16 some rows", columns, some=True, main=columns == 1024)
    yield from case("bf16 chunked", 1024, chunks=8)
    yield from case("fp32", 1024, FP32)
    yield from case("bf16", 257)


def retrieval() -> Iterator[Shipped]:
    def case(half_keys: int, k: int, dtype=BF16, *, main=False, dim=256) -> Iterator[Shipped]:
        query = meta(TOKENS, HEADS, 2 * dim, dtype=dtype)
        keys = meta(HEADS, 2, half_keys, dim, dtype=dtype)
        indices = meta(TOKENS, HEADS, k, dtype=INT32)
        scores = meta(TOKENS, HEADS, k, dtype=FP32)
        what = f"N={half_keys} K={k} Dk={2 * dim} {short(dtype)}"
        for call, name in (
            (lambda: product_key.topk(query, keys, k, True), what),
            (lambda: product_key.gradients(query, keys, indices, scores), what),
        ):
            yield from shipped_by(call, name, main=main, wide=dim % 16 == 0)

    for half_keys in (768, 1024, 4096, 16384):
        yield from case(half_keys, 32, main=half_keys == 1024)
        yield from case(half_keys, 32, FP32)
    for k in (1, 8):
        yield from case(1024, k)
    yield from case(1024, 64, main=["narrow_candidates"])
    yield from case(16384, 64)
    yield from case(1024, 32, FP16)
    yield from case(1000, 32, dim=64)
    yield from case(16, 1, dim=50)


def optimizers() -> Iterator[Shipped]:
    seed, step, lr, eps, betas, looped_steps = 1234, 1000, 1e-3, 1e-8, (0.9, 0.98), 64

    def case(
        what: str,
        columns: int,
        dtype=BF16,
        *,
        rounding="nearest",
        main=False,
        fp8=False,
        chunks=1,
        gradient_dtype=BF16,
        state_dtype=FP32,
    ) -> Iterator[Shipped]:
        table = table_of(columns, dtype, chunks=chunks)
        remainder = table_of(columns, INT16, chunks=chunks) if rounding == "exact" else []
        shadow = shadow_of(columns, chunks=chunks) if fp8 else []
        weights = (table, remainder, shadow, rounding, seed, step)
        gradient = RowGradients.empty(table[0], TOKENS * READS, dtype=gradient_dtype).buffers()
        scale = meta(1, dtype=FP32)
        state = table_of(columns, state_dtype, chunks=chunks)
        row_state = [meta(ROWS // chunks, dtype=FP32)] * chunks
        last_step = [meta(ROWS // chunks, dtype=INT32)] * chunks
        history = meta(4096, 4, dtype=torch.float64)
        moments = (state, state, last_step, history, *betas, eps, looped_steps)

        def row_wise():
            updates.row_wise_adagrad(*weights, gradient, scale, row_state, lr, eps)

        calls = (
            ("", lambda: updates.row_sgd(*weights, gradient, scale, lr)),
            ("", lambda: updates.row_adagrad(*weights, gradient, scale, state, lr, eps)),
            (" row-wise", row_wise),
            ("", lambda: updates.row_adam(*weights, gradient, scale, *moments)),
            (" catch-up", lambda: updates.row_adam_catch_up(*weights, gradient[0], *moments)),
            (" catch-up all", lambda: updates.row_adam_catch_up(*weights, None, *moments)),
        )
        for suffix, call in calls:
            name = f"D={columns} {what}{suffix}"
            yield from shipped_by(call, name, main=main, wide=is_wide(columns, dtype))

    for columns in (*SLICE_WIDTHS, *MODEL_WIDTHS):
        yield from case("bf16 exact", columns, rounding="exact")
        yield from case("bf16 stochastic", columns, rounding="stochastic")
        yield from case("bf16 exact fp8", columns, rounding="exact", fp8=True, main=columns == 1024)
        yield from case(
            "bf16 stochastic fp8",
            columns,
            rounding="stochastic",
            fp8=True,
            main=["row_sgd"] if columns == 1024 else (),
        )
    yield from case("bf16 nearest", 1024)
    yield from case("bf16 stochastic bf16 states", 1024, rounding="stochastic", state_dtype=BF16)
    yield from case("bf16 exact fp8 chunked", 1024, rounding="exact", fp8=True, chunks=8)
    yield from case("fp32", 1024, FP32, gradient_dtype=FP32)
    yield from case("bf16 exact fp8", 8192, rounding="exact", fp8=True)
    for columns in ODD_WIDTHS:
        yield from case("bf16 exact fp8", columns, rounding="exact", fp8=True)


def peer() -> Iterator[Shipped]:
    for columns, dtype in ((512, BF16), (1024, BF16), (1024, FP32), (257, BF16)):
        table = table_of(columns, dtype)
        sinks = sinks_of("rows", columns, 1, dtype)
        indices = meta(TOKENS, READS, dtype=INT32)
        weights = meta(TOKENS, READS, dtype=FP32)
        x = meta(TOKENS, columns, dtype=dtype)
        forward = (table, table, indices, weights, x, [], [])
        backward = (table, table, indices, weights, x, weights, x, [], [], "rows", sinks, sinks)
        for call in (
            lambda forward=forward: experts.peer_experts(*forward),
            lambda backward=backward: experts.peer_backward(*backward),
        ):
            is_main = columns == 1024 and dtype == BF16
            yield from shipped_by(
                call,
                f"peer D={columns} {short(dtype)}",
                main=["coefficients", "coefficient_gradients"] if is_main else (),
                wide=is_wide(columns, dtype),
            )
