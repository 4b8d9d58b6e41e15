"""The command line of run.py."""

import argparse
from pathlib import Path

import torch

from benchmarks.speed.processes import SCRIPT, in_processes
from benchmarks.speed.report import environment, markdown, write_results
from benchmarks.speed.results import Row, summary
from benchmarks.speed.worker import MODULES, work

QUICK = "--quick: tiny sizes, to see that everything runs; the figures mean nothing"
RESULTS = SCRIPT.parent / "results"


def main(description: str, arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line names; the exit status."""
    args = _parse(description, arguments)
    if args.records:
        work(args)
        return 0
    facts = environment(args.commit)
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    if args.quick:
        print(QUICK, flush=True)
    rows: list[Row] = []
    limits: dict[str, str] = {}
    for name in args.benchmarks:
        measured, limits[name] = in_processes(args, name)
        rows += measured
    print("\n" + "\n".join(summary(rows)))
    if args.quick:
        print(QUICK)
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
        "--time-limit", type=int, metavar="SECONDS",
        help="of each case; one that hangs is ended and counts as failed (default: 75 on a GPU, "
        "900 on the CPU)",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first-case", type=int, default=0, help=argparse.SUPPRESS)
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
    if args.time_limit is None:
        args.time_limit = 75 if args.device == "cuda" else 900
    if args.time_limit < 1:
        parser.error(f"--time-limit {args.time_limit}: at least 1 is wanted")
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
