"""The command line of run.py: benchmarks in processes of their own, their rows gathered."""

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.speed.report import Terminal, environment, markdown, write_results
from benchmarks.speed.results import Goal, Row, summary
from benchmarks.speed.roofline import measure_limits
from benchmarks.speed.setting import Setting

MODULES = {
    "bag": "bag",
    "backward": "backward",
    "retrieval": "retrieval",
    "optimizer": "optimizer",
    "layer": "layer",
    "memory": "peak_memory",
}
SCRIPT = Path(__file__).parents[1] / "run.py"
RESULTS = SCRIPT.parent / "results"


def main(description: str, arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line names; the exit status."""
    args = _parse(description, arguments)
    if args.records:
        return _worker(args)
    facts = environment(args.commit)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if args.quick:
        print(
            "--quick: tiny sizes, to see that everything runs; the figures mean nothing", flush=True
        )
    rows: list[Row] = []
    limits: dict[str, str] = {}
    for name in args.benchmarks:
        measured, limits[name] = _in_process(args, name)
        rows += measured
    print("\n" + "\n".join(summary(rows)))
    if args.results:
        text = markdown(rows, limits, facts, _command(args))
        part = "" if len(args.benchmarks) == len(MODULES) else "-".join(args.benchmarks)
        print(f"written: {write_results(args.results, facts, part, text).name}")
    return int(any(row.failed for row in rows))


def _parse(description: str, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("benchmarks", nargs="+", choices=[*MODULES, "all"], metavar="BENCHMARK")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu",
        help="default: cuda where torch sees a GPU",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[], metavar="S",
        help="rows of the tables, powers of two: of the small one, then of the large one",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=Path, metavar="DIR",
        help="a checkout of github.com/facebookresearch/memory, outside this repository",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="where to write <date>-<gpu>.md; default: results/ beside this file, for a GPU's "
        "runs that are not quick",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N",
        help="of the CPU (default: torch's own choice); 1 where other programs run",
    )  # fmt: skip
    parser.add_argument("--commit", metavar="ID", help="what is measured, where git cannot say")
    parser.add_argument(
        "--time-limit", type=float, default=180, metavar="SECONDS",
        help="of each benchmark; one that hangs is ended and counts as failed (default 180)",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    _check(parser, args, on_gpu)
    torch.set_num_threads(args.threads)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace, on_gpu: bool) -> None:
    """Refuse what cannot be, and fill in what follows from the rest."""
    if args.device == "cuda" and not on_gpu:
        parser.error("--device cuda: torch sees no GPU")
    if args.results and (args.device != "cuda" or args.quick):
        parser.error("--results: only a GPU's run that is not --quick has results to keep")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: at least 1 is wanted")
    if any(rows < 2 or rows & (rows - 1) for rows in args.rows) or len(args.rows) > 2:
        parser.error(f"--rows {args.rows}: one or two powers of two wanted")
    if args.reference and not args.reference.is_dir():
        parser.error(f"--reference {args.reference}: no such folder")
    if "all" in args.benchmarks:
        args.benchmarks = list(MODULES)
    if args.device == "cuda" and not args.quick and args.results is None:
        args.results = RESULTS


def _command(args: argparse.Namespace) -> str:
    """What was run, without the machine's paths."""
    every = len(args.benchmarks) == len(MODULES)
    words = ["python kernels/benchmarks/run.py", *(["all"] if every else args.benchmarks)]
    words += ["--device", args.device]
    words += ["--rows", *map(str, args.rows)] if args.rows else []
    words += ["--threads", str(args.threads)] if args.device == "cpu" else []
    words += ["--reference DIR"] if args.reference else []
    return " ".join(words)


def _in_process(args: argparse.Namespace, name: str) -> tuple[list[Row], str]:
    """A benchmark's rows, as far as it came, and its limits.

    In a process of its own: after an error of a kernel nothing more can run on the GPU in one, and
    one that hangs can be ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        records.touch()
        command = [sys.executable, str(SCRIPT), name, "--device", args.device]
        command += ["--records", str(records), "--threads", str(args.threads)]
        command += ["--quick"] if args.quick else []
        command += ["--rows", *map(str, args.rows)] if args.rows else []
        command += ["--reference", str(args.reference)] if args.reference else []
        try:
            status = subprocess.run(command, timeout=args.time_limit).returncode
            problem = f"its process ended with {status}"
        except subprocess.TimeoutExpired:
            status, problem = 1, f"ended after {args.time_limit:g} s; see --time-limit"
        lines = [json.loads(text) for text in records.read_text().splitlines()]
    limits = next((line["limits"] for line in lines if "limits" in line), "not measured")
    rows = [_row(line) for line in lines if "what" in line]
    if status and not any(row.failed for row in rows):
        rows.append(Row(what=name, case="the rest of it", note=problem, failed=True))
        Terminal().print(rows[-1])
    return rows, limits


def _row(fields: dict) -> Row:
    return Row(**{**fields, "goal": Goal(**fields["goal"])})


def _worker(args: argparse.Namespace) -> int:
    """Measure one benchmark, print its rows and write them to the file of records."""
    (name,) = args.benchmarks
    device = torch.device(args.device)
    if args.quick:
        torch.set_num_threads(1)  # starting the others takes longer than tiny work
    limits = measure_limits(device, args.quick)
    print(f"\n{name} (limits: {limits})")
    terminal = Terminal()
    setting = Setting(
        device=device,
        scale="quick" if args.quick else "gpu" if args.device == "cuda" else "cpu",
        limits=limits,
        rows=tuple(args.rows),
        reference=args.reference,
        case_seconds=0.01 if args.quick else 1.5 if args.device == "cuda" else 4.0,
    )
    failed = False
    with args.records.open("a") as records:
        records.write(json.dumps({"limits": str(limits)}) + "\n")
        for row in measure(name, setting):
            failed |= row.failed
            terminal.print(row)
            records.write(json.dumps(dataclasses.asdict(row)) + "\n")
            records.flush()
    return int(failed)


def measure(name: str, setting: Setting) -> Iterator[Row]:
    """The rows of a benchmark as they come; a case that fails is a row too."""
    module = importlib.import_module(f"benchmarks.speed.{MODULES[name]}")
    for case in module.cases(setting):
        try:
            yield from case.measure()
        except Exception as error:  # whatever it is, the other cases are wanted
            traceback.print_exc()
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield Row(what=case.what, case=case.case, note=note, failed=True)
