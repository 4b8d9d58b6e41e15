"""One measured figure, what it is held against, and how both are printed."""

import collections
import dataclasses

GIB = float(1 << 30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """What a figure must reach and what it is hoped to reach."""

    least: float | None = None
    aim: float | None = None


NO_GOAL = Goal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A figure: ours beside another way, or beside the physical limit.

    | measure | value | better |
    |---|---|---|
    | `speed-up` | theirs / ours | higher |
    | `share` | floor / ours: the share of the limit that is reached | higher |
    | `relative` | ours / theirs | lower |
    """

    what: str
    case: str
    """Sizes, dtypes, distribution."""
    measure: str = "speed-up"
    unit: str = "ms"
    """`ms`: times in seconds; `GiB`: memory in bytes."""
    ours: float | None = None
    """None: not measured, `note` says why."""
    theirs: float | None = None
    against: str = ""
    floor: float | None = None
    """The least that the physical limits allow, in the unit of ours."""
    spread: float | None = None
    """Of ours: the middle half's width over the median."""
    goal: Goal = NO_GOAL
    note: str = ""
    failed: bool = False
    """An error, and not a decision, kept it from being measured."""

    @property
    def share(self) -> float | None:
        """floor / ours."""
        return self.floor / self.ours if self.floor and self.ours else None

    @property
    def value(self) -> float | None:
        """What the goal is about."""
        if self.measure == "share":
            return self.share
        if self.ours is None or self.theirs is None:
            return None
        if self.measure == "relative":
            return self.ours / self.theirs if self.theirs else None
        return self.theirs / self.ours

    def reaches(self, wanted: float | None) -> bool | None:
        """Whether the value is as good as `wanted`; None where either is not known."""
        if wanted is None or self.value is None:
            return None
        return self.value <= wanted if self.measure == "relative" else self.value >= wanted

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.failed:
            return "FAILED"
        if self.value is None:
            return "not run"
        if self.reaches(self.goal.aim):
            return "aim"
        met = self.reaches(self.goal.least)
        if met is None:
            return "" if self.goal.aim is None else "below aim"
        return "met" if met else "MISSED"


HEADINGS = ("what", "case", "ours", "against", "theirs", "value", "least", "aim", "")
HEADINGS += ("floor", "of limit", "spread")


def cells(row: Row) -> tuple[str, ...]:
    """The row as HEADINGS has it."""
    return (
        row.what,
        row.case,
        _quantity(row.ours, row.unit),
        row.against,
        _quantity(row.theirs, row.unit),
        _value(row.value, row.measure),
        _goal(row.goal.least, row.measure),
        _goal(row.goal.aim, row.measure),
        row.verdict,
        _quantity(row.floor, row.unit),
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.spread is None else f"{row.spread:.0%}",
    )


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit == "GiB":
        return f"{value / GIB:.2f} GiB"
    return f"{value * 1e3:#.3g} ms" if value < 0.0995 else f"{value * 1e3:,.0f} ms"


def _value(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if measure == "share" else f"{value:.2f}x"


def _goal(wanted: float | None, measure: str) -> str:
    if wanted is None:
        return ""
    sign = "<=" if measure == "relative" else ">="
    return f"{sign}{wanted:.0%}" if measure == "share" else f"{sign}{wanted:g}x"


def summary(rows: list[Row]) -> list[str]:
    """Met and missed in a line; then each goal that was missed, and what was not run."""
    with_goal = [row for row in rows if row.goal.least is not None]
    met = [row for row in with_goal if row.reaches(row.goal.least)]
    at_aim = [row for row in rows if row.reaches(row.goal.aim)]
    missed = [row for row in with_goal if row.reaches(row.goal.least) is False]
    not_run = [row for row in rows if row.verdict == "not run"]
    lines = [
        f"Summary: of {len(with_goal)} targets {len(met)} met, {len(missed)} missed, "
        f"{len(with_goal) - len(met) - len(missed)} not measured; aims reached: {len(at_aim)}"
    ]
    for row in missed:
        lines.append(
            f"missed: {row.what}, {row.case}: {_value(row.value, row.measure)}, wanted "
            f"{_goal(row.goal.least, row.measure)}"
        )
    lines += [f"FAILED: {row.what}, {row.case}: {row.note}" for row in rows if row.failed]
    reasons = collections.Counter(row.note for row in not_run)
    lines += [f"not run: {reason} ({count} figures)" for reason, count in reasons.items()]
    return lines
