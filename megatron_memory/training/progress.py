"""What a training says: a line each log interval, and on a terminal a bar with the time left."""

import contextlib
import sys
from typing import TYPE_CHECKING

from megatron_memory.output import try_print
from megatron_memory.training.metrics import Report

if TYPE_CHECKING:
    from rich.progress import Progress


class Console:
    """Prints on the first rank.

    Args:
        is_speaker: whether this rank prints.
    """

    def __init__(self, *, is_speaker: bool):
        self._is_speaker = is_speaker
        self._bar: Progress | None = None
        self._lost = ""

    def say(self, line: str) -> None:
        """One line. The training goes on where it cannot be written, and a later line says so."""
        if not self._is_speaker:
            return
        lost = self._print(line)
        if lost is None and self._lost:
            lost = self._print(f"lines before this one may be missing: {self._lost}")
            self._lost = ""
        elif lost is not None and not self._lost:
            self._lost = str(lost)
            try_print(
                f"lines cannot be written to the standard output: {lost}. The training goes on",
                sys.stderr,
            )

    def _print(self, line: str) -> OSError | None:
        if self._bar is None:
            return try_print(line, sys.stdout)
        try:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        except OSError as error:
            return error
        return None

    def start(self, iteration: int, train_iters: int) -> None:
        """The training begins after `iteration`."""
        if not (self._is_speaker and sys.stdout.isatty()):
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        )
        self._bar.add_task("training", total=train_iters, completed=iteration)
        self._bar.start()

    def advance(self, iteration: int) -> None:
        """`iteration` is done."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.update(self._bar.task_ids[0], completed=iteration)

    def stop(self) -> None:
        """The training ends."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None


def report_line(report: Report, train_iters: int) -> str:
    """A report on one line."""
    last = report.last
    with_values = last.value_learning_rate is not None
    parts = [
        f"iteration {report.iteration:>{len(str(train_iters))}}/{train_iters}",
        f"loss {report.loss:.6f}",
        f"grad norm {_number(last.grad_norm)}"
        + (f" (values {_number(last.value_grad_norm)})" if with_values else ""),
        f"lr {last.learning_rate:.3e}"
        + (f" (values {last.value_learning_rate:.3e})" if with_values else ""),
        f"{report.tokens_per_second:,.0f} tokens/s",
        f"{report.seconds_per_iteration * 1e3:,.1f} ms/iteration",
        f"{report.tflops_per_device:.3g} TFLOP/s a device, "
        f"MFU {'n/a' if report.mfu is None else f'{report.mfu:.1%}'}",
        f"{report.memory_gib:.2f} GiB",
    ]
    if report.usage:
        parts.append("slots read " + _usage(report))
    if report.num_skipped:
        parts.append(f"{report.num_skipped} skipped")
    if report.num_spikes:
        parts.append(f"{report.num_spikes} in a loss spike")
    parts.append(f"{duration(report.seconds_left)} left")
    return " | ".join(parts)


def _usage(report: Report) -> str:
    figures = report.usage.get("pool")
    chosen = {"pool": figures} if figures is not None else report.usage
    return ", ".join(
        f"{name.replace('_', ' ')} {f.share_of_slots_read:.1%} KL {f.kl_to_uniform:.2f}"
        for name, f in chosen.items()
    )


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour; days before that."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
