"""Contenders timed in turn, so that their ratios come from the same minutes of the same machine."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_LARGER_THAN_ANY_CACHE = 256 << 20
_WARM_UPS = 2
_MOST = 60


class Stopwatch:
    """Adds up the time of the blocks under it: of the GPU by events, of the CPU by its clock.

    with watch:
        ...
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def __enter__(self) -> "Stopwatch":
        self._mark()
        return self

    def __exit__(self, *exception: object) -> None:
        self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        """The sum of all blocks; waits for the GPU."""
        blocks = zip(self._marks[::2], self._marks[1::2], strict=True)
        if not self._on_gpu:
            return sum(end - start for start, end in blocks)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in blocks) / 1e3


Contender = Callable[[Stopwatch, Any], object]
"""Takes a stopwatch and the inputs of this repetition; what it times, it does under the watch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What a contender took over all repetitions, in seconds."""

    median: float
    low: float
    """A quarter of the repetitions took less."""
    high: float
    """A quarter took more."""
    count: int

    @property
    def spread(self) -> float:
        """The middle half's width over the median."""
        return (self.high - self.low) / self.median


def compare(
    contenders: Mapping[str, Contender],
    draw: Callable[[], Any],
    device: torch.device,
    budget_seconds: float,
    fewest: int = 5,
) -> dict[str, Sample]:
    """Time every contender on the same inputs, repetition after repetition.

    Each repetition draws inputs anew, all contenders take them, and another one begins every time.
    Before each, on a GPU, the cache is overwritten; that also keeps the GPU busy while the host
    launches, so that a contender of many small kernels is not charged for the host's pace.

    Args:
        budget_seconds: about how long all of it may take after the warm-up.
        fewest: repetitions made in any case, two or more.
    """
    names = list(contenders)
    scratch = _scratch(device)
    for _ in range(_WARM_UPS - 1):
        _repetition(contenders, names, draw(), device, scratch)
    began = time.perf_counter()
    _repetition(contenders, names, draw(), device, scratch)
    one = time.perf_counter() - began
    count = max(fewest, min(_MOST, int(budget_seconds / one)))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(count):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name, taken in _repetition(contenders, order, draw(), device, scratch).items():
            seconds[name].append(taken)
    return {name: _sample(taken) for name, taken in seconds.items()}


def _repetition(contenders, order, inputs, device, scratch) -> dict[str, float]:
    seconds = {}
    for name in order:
        watch = Stopwatch(device)
        if scratch is not None:
            for _ in range(8):
                scratch.zero_()
        contenders[name](watch, inputs)
        seconds[name] = watch.seconds()
    return seconds


def _scratch(device: torch.device) -> torch.Tensor | None:
    if device.type != "cuda":
        return None
    return torch.empty(_LARGER_THAN_ANY_CACHE, dtype=torch.uint8, device=device)


def _sample(seconds: list[float]) -> Sample:
    low, _, high = statistics.quantiles(seconds, n=4)
    return Sample(median=statistics.median(seconds), low=low, high=high, count=len(seconds))
