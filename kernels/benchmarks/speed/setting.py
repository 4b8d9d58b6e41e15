"""What every benchmark is given, and how it hands back its figures."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from benchmarks.speed.results import Row
from benchmarks.speed.roofline import Cost, Limits, floor_seconds
from benchmarks.speed.timing import Contender, Sample, compare

SCALES = ("gpu", "cpu", "quick")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how large."""

    device: torch.device
    scale: str
    """One of SCALES; `quick` is for seeing that everything runs, its figures mean nothing."""
    limits: Limits
    rows: tuple[int, ...] = ()
    """Rows of the tables in place of the benchmarks' own: the small table's, then the large's."""
    reference: Path | None = None
    """A checkout of the public reference."""
    case_seconds: float = 1.5
    """About how long the repetitions of one case may take."""

    @property
    def dtype(self) -> torch.dtype:
        """What models are trained in on such a machine."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def table_rows(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """`own`, or what the user wants in its place."""
        return (self.rows + own[len(self.rows) :])[: len(own)]

    def compare(self, contenders: dict[str, Contender], draw: Callable) -> dict[str, Sample]:
        """`timing.compare` on this device."""
        fewest = 2 if self.scale == "quick" else 5
        return compare(contenders, draw, self.device, self.case_seconds, fewest)

    def floor(self, *stages: Cost) -> float:
        """Seconds that the stages take at least."""
        return floor_seconds(stages, self.limits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A part of a benchmark that fails alone."""

    what: str
    case: str
    measure: Callable[[], Iterable[Row]]


def empty_cache(setting: Setting) -> None:
    """Give the GPU's freed blocks back, so that the next case's large ones fit."""
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
