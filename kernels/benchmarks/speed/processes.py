"""Benchmarks in processes of their own.

After an error of a kernel nothing more can run on the GPU in its process, and one that hangs can
only be ended: another process then goes on with the next case.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.report import Terminal
from benchmarks.speed.results import Goal, Row

SCRIPT = Path(__file__).parents[1] / "run.py"


def in_processes(args: argparse.Namespace, name: str) -> tuple[list[Row], str]:
    """All rows of a benchmark, and the limits that its first process measured."""
    rows: list[Row] = []
    limits = ""
    first_case: int | None = 0
    while first_case is not None:
        status, lines = _process(args, name, first_case)
        limits = limits or next((line["limits"] for line in lines if "limits" in line), "")
        rows += [_row(line["row"]) for line in lines if "row" in line]
        first_case = None
        if status:
            begun = [line for line in lines if "number" in line]
            if "row" not in lines[-1] or not lines[-1]["row"]["failed"]:
                rows.append(_failed(args, name, status, begun))
                Terminal().print(rows[-1])
            if begun:
                first_case = begun[-1]["number"] + 1
    return rows, limits or "not measured"


def _process(args: argparse.Namespace, name: str, first_case: int) -> tuple[int, list[dict]]:
    """The exit status of a worker and what it recorded."""
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "records"
        records.write_text("{}\n")
        command = [sys.executable, str(SCRIPT), name, "--device", args.device]
        command += ["--records", str(records), "--first-case", str(first_case)]
        command += ["--threads", str(args.threads), "--time-limit", str(args.time_limit)]
        command += ["--quick"] if args.quick else []
        command += ["--rows", *map(str, args.rows)] if args.rows else []
        command += ["--reference", str(args.reference)] if args.reference else []
        status = subprocess.run(command).returncode
        return status, [json.loads(text) for text in records.read_text().splitlines()]


def _failed(args: argparse.Namespace, name: str, status: int, begun: list[dict]) -> Row:
    """The row of the case in which a process ended."""
    note = f"its process ended with {status}"
    if status == -signal.SIGALRM:
        note = f"ended after {args.time_limit} s; see --time-limit"
    case = begun[-1] if begun else {"what": name, "case": "all of it"}
    return Row(what=case["what"], case=case["case"], note=note, failed=True)


def _row(fields: dict) -> Row:
    return Row(**{**fields, "goal": Goal(**fields["goal"])})
