"""Physical limits: what this machine copies and multiplies, and what each operator needs at least.

Bytes are those that must cross the memory bus if nothing is read or written twice; cached rows, the
sort of the indices and every temporary are left out. So no implementation of an operator is much
faster than its floor, as long as its rows do not fit in the cache.
"""

import dataclasses
import statistics
from collections.abc import Sequence

import torch

from benchmarks.speed.timing import Stopwatch

INDEX_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Rates of large transfers and products, measured in the process that measures the rest."""

    bytes_a_second: float
    """A copy, counting bytes read and bytes written."""
    flops_a_second: float
    """A square matrix product: bf16 on a GPU, fp32 on the CPU."""

    def __str__(self) -> str:
        return (
            f"copy {self.bytes_a_second / 1e9:,.0f} GB/s, "
            f"matrix product {self.flops_a_second / 1e12:,.2f} TFLOP/s"
        )


def measure_limits(device: torch.device, quick: bool) -> Limits:
    """Median of ten copies of random values, larger than any cache, and of ten products."""
    on_gpu = device.type == "cuda"
    num_values, size = (1 << 30, 8192) if on_gpu else (1 << 26, 1536)
    if quick:
        num_values, size = 1 << 16, 64
    source = torch.randint(0, 127, (num_values,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    # Random values: products of zeros run faster.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = _median(lambda: a @ b, device)
    return Limits(bytes_a_second=2 * num_values / copy, flops_a_second=2 * size**3 / product)


def _median(work, device: torch.device) -> float:
    seconds = []
    for _ in range(13):
        watch = Stopwatch(device)
        with watch:
            work()
        seconds.append(watch.seconds())
    return statistics.median(seconds[3:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The least that one stage must do."""

    bytes: float = 0.0
    flops: float = 0.0

    def __mul__(self, times: float) -> "Cost":
        return Cost(bytes=self.bytes * times, flops=self.flops * times)


def floor_seconds(stages: Sequence[Cost], limits: Limits) -> float:
    """Of stages one after the other, each bound by its bytes or by its products."""
    return sum(
        max(stage.bytes / limits.bytes_a_second, stage.flops / limits.flops_a_second)
        for stage in stages
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bag:
    """A bag's sizes."""

    tokens: int
    bag: int
    rows: int
    columns: int
    element: int = 2
    """Bytes of a value of the table as it is read: 1 of an fp8 shadow."""
    output: int = 2
    """Bytes of a value of y, of the gate and of their gradients."""

    @property
    def reads(self) -> int:
        """Rows read, repeats counted."""
        return self.tokens * self.bag

    @property
    def distinct(self) -> float:
        """Rows read at least once, of `reads` uniform ones; the mean."""
        return self.rows * (1 - (1 - 1 / self.rows) ** self.reads)

    def forward(self, *, gated: bool = False, distinct: float | None = None) -> Cost:
        """Every read of a row reaches memory, for tables are far larger than caches.

        Args:
            gated: with a gate; the sums before it are kept for the backward.
            distinct: rows read at least once, of reads that repeat some rows so often that caches
                serve them: then each of them is counted once.
        """
        rows_read = self.reads if distinct is None else distinct
        scale = 4 if self.element == 1 else 0
        vectors = 3 if gated else 1
        return Cost(
            bytes=rows_read * (self.columns * self.element + scale)
            + self.reads * (INDEX_BYTES + self.output)
            + self.tokens * self.columns * self.output * vectors
        )

    def backward(self, form: str, gradient: int, distinct: float | None = None) -> Cost:
        """Gradients of weights and table: each row that was read is read once, its gradient written
        once.

        Args:
            form: of the table's gradient: `dense` (all S rows written), `main_grad` (rows read and
                written) or `rows`.
            gradient: bytes of one of its values.
            distinct: rows read at least once, if not the mean of uniform reads.
        """
        touched = self.distinct if distinct is None else distinct
        written = {"dense": self.rows, "main_grad": 2 * touched, "rows": touched}[form]
        a_read = INDEX_BYTES + 2 * self.output  # index, weight, the weight's gradient
        return Cost(
            bytes=self.columns * (touched * self.element + written * gradient)
            + self.reads * a_read
            + self.tokens * self.columns * self.output
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A product-key retrieval's sizes, in bf16."""

    tokens: int
    heads: int
    half_keys: int
    key_dim: int
    k: int
    element: int = 2

    @property
    def _query_bytes(self) -> float:
        return self.tokens * self.heads * self.key_dim * self.element

    @property
    def _key_bytes(self) -> float:
        return self.heads * self.half_keys * self.key_dim * self.element

    @property
    def _slots(self) -> int:
        return self.tokens * self.heads * self.k

    def forward(self) -> Cost:
        """All half scores, on tensor cores; queries and keys read, indices and weights written."""
        flops = 2 * self.tokens * self.heads * self.half_keys * self.key_dim
        written = self._slots * (INDEX_BYTES + 4)
        return Cost(flops=flops, bytes=self._query_bytes + self._key_bytes + written)

    def backward(self) -> Cost:
        """Only the chosen half-keys have gradients: K of each half at most, for both operands."""
        flops = 2 * 2 * self._slots * self.key_dim
        moved = 2 * (self._query_bytes + self._key_bytes) + self._slots * (INDEX_BYTES + 2 * 4)
        return Cost(flops=flops, bytes=moved)


def linear(tokens: int, inputs: int, outputs: int, element: int = 2) -> Cost:
    """A matrix product x [T, inputs] @ W [inputs, outputs]; its backward is two such products."""
    values = tokens * inputs + inputs * outputs + tokens * outputs
    return Cost(flops=2 * tokens * inputs * outputs, bytes=element * values)
