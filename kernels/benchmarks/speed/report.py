"""The table on the terminal and the file of a GPU's results."""

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.speed.results import HEADINGS, Row, cells, summary

_WIDTHS = (50, 9, 33, 9, 7, 7, 7, 9, 10, 8, 6)
_WORDS = (0, 2, 7)  # on the left of their columns


class Terminal:
    """The table as it comes, row by row, so that nothing is lost if a later one fails."""

    def __init__(self) -> None:
        self._case = ""

    def print(self, row: Row) -> None:
        """The row; before the first of a case, the case and the headings."""
        what, case, *rest = cells(row)
        if case != self._case:
            self._case = case
            print(f"\n{case}")
            print(_line((HEADINGS[0], *HEADINGS[2:])))
        print(_line((what, *rest)) + (f"  ({row.note})" if row.note else ""), flush=True)


def _line(texts: Sequence[str]) -> str:
    parts = [
        text.ljust(width) if number in _WORDS else text.rjust(width)
        for number, (text, width) in enumerate(zip(texts, _WIDTHS, strict=True))
    ]
    return "  ".join(parts).rstrip()


def environment(commit: str | None) -> dict[str, str]:
    """Versions, and what was measured; no host's name and no path."""
    on_gpu = torch.cuda.is_available()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(0) if on_gpu else f"CPU, {os.cpu_count()} cores",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "CUDA": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "Python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "commit": commit or _commit(),
    }


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "none"
    return triton.__version__


def _commit() -> str:
    folder = Path(__file__).parent
    commit = _first_line("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = _first_line("git", "-C", str(folder), "status", "--porcelain", "-uno", "--", "..")
    return commit + (" with changes" if commit != "unknown" and changed != "unknown" else "")


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else "unknown"


def markdown(
    rows: list[Row], limits: Mapping[str, str], facts: Mapping[str, str], command: str
) -> str:
    """The results file's text.

    Args:
        limits: for each benchmark, the limits measured in its process.
    """
    parts = [f"# {facts['device']}, {facts['date']}", ""]
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    parts += [f"- command: `{command}`"]
    parts += [f"- limits, {name}: {value}" for name, value in limits.items()]
    parts += ["", "kernels/benchmarks/README.md says what the columns are.", ""]
    parts += [_markdown_line(HEADINGS), _markdown_line(["---"] * len(HEADINGS))]
    parts += [_markdown_line(cells(row)) for row in rows]
    parts += ["", *(f"- {text}" for text in summary(rows)), ""]
    return "\n".join(parts)


def _markdown_line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


def write_results(folder: Path, facts: Mapping[str, str], benchmarks: str, text: str) -> Path:
    """<date>-<gpu>.md in `folder`, whole or not at all; with `benchmarks` in its name if not ``."""
    day = facts["date"].split()[0]
    name = "-".join(filter(None, (day, _slug(facts["device"]), benchmarks)))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    unfinished = folder / f"{name}.md.tmp"
    unfinished.write_text(text)
    unfinished.replace(path)
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
