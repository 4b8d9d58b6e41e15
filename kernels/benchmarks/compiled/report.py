"""Compiles every kernel that ships, for GPUs that need not be there; says what it takes of them.

    python kernels/benchmarks/compile_report.py           the main configurations
    python kernels/benchmarks/compile_report.py --all     every configuration that ships
    python kernels/benchmarks/compile_report.py --record  write the main ones to registers.json
    python kernels/benchmarks/compile_report.py --list    print the names of the main ones

| column | is |
|---|---|
| registers | of a thread |
| warps/SM | that a multiprocessor holds at a time, of 64, by registers and shared memory |
| shared | bytes of shared memory a block |
| stack | bytes a thread of arrays that live in memory: 0 wanted |
| spills | instructions that load or store spilled registers: 0 wanted |
| 16 B loads, 16 B stores | "n of m": of m instructions on global memory n move 16 bytes a thread |
| MMA | instructions for the tensor cores |

They count instructions in the code, not how often they run. A problem, and the exit status 1, is a
launch that does not compile, has a stack or spills, of which no block fits on a multiprocessor or
whose grid is too large for CUDA; one over rows of 16-byte multiples that gets less than 40% of its
bytes by 16-byte loads; and a main one that takes more than registers.json has for this Triton: over
8 registers more, fewer warps/SM, fewer 16-byte loads. Under another Triton: pip install --no-deps
--target FOLDER triton==3.6.0, then PYTHONPATH=FOLDER before the command.
"""

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from benchmarks.compiled.cubin import ARCHITECTURES, Resources
from benchmarks.compiled.launches import Shipped, kernels_without_launch
from benchmarks.compiled.limits import (
    PATH,
    Limit,
    flaws,
    read_limits,
    regressions,
    triton_key,
    write_limits,
)
from benchmarks.compiled.offline import grid_problem, measure
from benchmarks.compiled.shipped import shipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the report: a launch on an architecture."""

    name: str
    arch: int
    main: bool
    resources: Resources | None
    """None where the kernel did not compile."""
    flaws: tuple[str, ...]
    """What no launch may have; Triton's message where the kernel did not compile."""


def main() -> int:
    """The exit code: 1 if anything is wrong, 2 if nothing was chosen."""
    arguments = parse_arguments()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("compile_report: TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    if arguments.triton and triton.__version__ != arguments.triton:
        sys.exit(f"compile_report: this is triton {triton.__version__}: {triton.__file__}")
    started = time.monotonic()
    launches = shipped()
    uncovered = (
        [] if arguments.only.pattern else kernels_without_launch(launches, main=not arguments.all)
    )
    offered = [one for one in launches if one.main or arguments.all]
    chosen = [one for one in offered if arguments.only.search(one.name)]
    if not chosen:
        print(nothing_chosen(arguments, launches), file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(one.name for one in chosen))
        return 0
    rows = compile_all(chosen, arguments.arch, arguments.jobs)
    recorded = read_limits(arguments.limits).get(triton_key(), {})
    if arguments.record:
        record(rows, arguments.limits)
        worse = {}
    else:
        worse = {row: found for row in rows if (found := what_is_worse(row, recorded))}
    problems = [f"{kernel}: in no launch of shipped.py" for kernel in uncovered]
    for row in rows:
        found = (*row.flaws, *worse.get(row, ()))
        if found:
            problems.append(f"{row.name} on sm_{row.arch}: {'; '.join(found)}")
    seconds = time.monotonic() - started
    if arguments.json:
        print_json(rows, problems, seconds)
    else:
        print_report(rows, problems, seconds, has_limits=bool(recorded))
    return 1 if problems else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every configuration that ships")
    parser.add_argument(
        "--arch",
        nargs="+",
        type=int,
        choices=ARCHITECTURES,
        default=ARCHITECTURES,
        help="compute capabilities",
    )
    parser.add_argument(
        "--only",
        type=expression,
        default="",
        metavar="PATTERN",
        help="launches in whose name this regular expression is found",
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of the launches; compile nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write what main ones take as limits of this Triton; those of others stay",
    )
    parser.add_argument("--limits", type=Path, default=PATH, help="the file of limits")
    parser.add_argument("--triton", metavar="VERSION", help="stop unless this is the one that runs")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile"
    )
    return parser.parse_args()


def expression(text: str) -> re.Pattern:
    """The regular expression of --only."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def nothing_chosen(arguments: argparse.Namespace, launches: list[Shipped]) -> str:
    """What is said where --only finds no launch."""
    elsewhere = sum(bool(arguments.only.search(one.name)) for one in launches)
    fix = f"--all has {elsewhere}" if elsewhere else "--list prints the names, --list --all of all"
    return f"compile_report: no launch has --only {arguments.only.pattern!r} in its name; {fix}"


def compile_all(launches: list[Shipped], archs: list[int], jobs: int) -> list[Row]:
    """A row for each launch on each architecture."""
    tasks = [(one, arch) for arch in archs for one in launches]
    # Forked, so that the workers have the launches already: kernels cannot be sent to processes.
    global _tasks
    _tasks = tasks
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=gc.freeze) as pool:
        return list(pool.map(compile_one, range(len(tasks)), chunksize=4))


_tasks: list[tuple[Shipped, int]] = []


def compile_one(number: int) -> Row:
    """The row of one of the tasks."""
    one, arch = _tasks[number]
    try:
        resources = measure(one.launch, arch)
    except Exception as error:  # Whatever it is, the report names the launch and goes on.
        return Row(
            name=one.name, arch=arch, main=one.main, resources=None, flaws=(innermost_cause(error),)
        )
    found = flaws(resources, wide=one.wide)
    if problem := grid_problem(one.launch):
        found.append(problem)
    return Row(name=one.name, arch=arch, main=one.main, resources=resources, flaws=tuple(found))


def innermost_cause(error: BaseException) -> str:
    """In a line. Triton wraps an error once for each function around it, each with its source."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"does not compile: {type(error).__name__}: {lines[-1]}"


def what_is_worse(row: Row, recorded: dict[int, dict[str, Limit]]) -> list[str]:
    """Than recorded; nothing without any record for this Triton, which print_report says."""
    if row.resources is None or not row.main or not recorded:
        return []
    limit = recorded.get(row.arch, {}).get(row.name)
    if limit is None:
        return [f"no limit recorded for {triton_key()}; --record records what is found"]
    return regressions(row.resources, limit)


def record(rows: list[Row], path: Path) -> None:
    """Write the rows as limits of this Triton, and drop those of launches that ship no more."""
    limits = read_limits(path)
    of_triton = limits.setdefault(triton_key(), {})
    known = {one.name for one in shipped() if one.main}
    for arch in ARCHITECTURES:
        kept = of_triton.get(arch, {})
        of_triton[arch] = {name: limit for name, limit in kept.items() if name in known}
    for row in rows:
        if row.resources is not None and row.main:
            of_triton[row.arch][row.name] = Limit.of(row.resources)
    write_limits(path, limits)


def print_json(rows: list[Row], problems: list[str], seconds: float) -> None:
    report = dict(
        triton=triton.__version__,
        seconds=seconds,
        rows=[dataclasses.asdict(row) for row in rows],
        problems=problems,
    )
    print(json.dumps(report, indent=1))


COLUMNS = ("registers", "warps/SM", "shared", "stack", "spills", "16 B loads", "16 B stores", "MMA")


def print_report(rows: list[Row], problems: list[str], seconds: float, *, has_limits: bool) -> None:
    print(f"triton {triton.__version__} from {Path(triton.__file__).parent}")
    lines = [("launch", "GPU", *COLUMNS)]
    for row in rows:
        cells = cells_of(row.resources) if row.resources else ("",) * len(COLUMNS)
        lines.append((row.name, f"sm_{row.arch}", *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        padded = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print("  ".join((name.ljust(widths[0]), *padded)).rstrip())
    if not has_limits:
        print(f"no limits were recorded for {triton_key()}: only the absolute ones were checked")
    for problem in problems:
        print(f"WRONG  {problem}")
    print(f"{len(rows)} compiled in {seconds:.0f} s, {len(problems)} problems")


def cells_of(resources: Resources) -> tuple[str, ...]:
    return (
        str(resources.registers),
        str(resources.warps),
        str(resources.shared),
        str(resources.stack),
        str(resources.spills),
        f"{resources.wide_loads} of {resources.loads}",
        f"{resources.wide_stores} of {resources.stores}",
        str(resources.matmuls),
    )


if __name__ == "__main__":
    sys.exit(main())
