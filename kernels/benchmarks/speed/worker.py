"""The process that measures one benchmark."""

import argparse
import dataclasses
import importlib
import itertools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

from benchmarks.speed.report import Terminal
from benchmarks.speed.results import Row
from benchmarks.speed.roofline import measure_limits
from benchmarks.speed.setting import Case, Setting

MODULES = {
    "bag": "bag",
    "backward": "backward",
    "retrieval": "retrieval",
    "optimizer": "optimizer",
    "layer": "layer",
    "memory": "peak_memory",
}
GPU_IS_LOST = 3
"""Exit status where an error of a kernel has left the process unable to use the GPU."""


def work(args: argparse.Namespace) -> None:
    """Measure one benchmark from its first case wanted on; print its rows, and write each to the
    file of records with the number of its case before it."""
    (name,) = args.benchmarks
    device = torch.device(args.device)
    if args.quick:
        torch.set_num_threads(1)  # starting the others takes longer than tiny work
    limits = measure_limits(device, args.quick)
    print(f"\n{name} (limits: {limits})", flush=True)
    terminal = Terminal()
    setting = Setting(
        device=device,
        scale="quick" if args.quick else "gpu" if args.device == "cuda" else "cpu",
        limits=limits,
        rows=tuple(args.rows),
        reference=args.reference,
        case_seconds=0.01 if args.quick else 1.5 if args.device == "cuda" else 4.0,
    )
    with args.records.open("a") as records:

        def record(fields: dict) -> None:
            records.write(json.dumps(fields) + "\n")
            records.flush()

        def begin(number: int, case: Case) -> None:
            # The signal's own action ends the process even where it waits for a kernel.
            signal.alarm(args.time_limit)
            record({"number": number, "what": case.what, "case": case.case})

        record({"limits": str(limits)})
        for row in measure(name, setting, args.first_case, begin):
            terminal.print(row)
            record({"row": dataclasses.asdict(row)})
            if row.failed and not _gpu_works(device):
                sys.exit(GPU_IS_LOST)


def _gpu_works(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def measure(
    name: str,
    setting: Setting,
    first_case: int = 0,
    begin: Callable[[int, Case], object] = lambda number, case: None,
) -> Iterator[Row]:
    """The rows of a benchmark as they come; a case that fails is a row too.

    Args:
        begin: called before each case.
    """
    module = importlib.import_module(f"benchmarks.speed.{MODULES[name]}")
    for number, case in itertools.islice(enumerate(module.cases(setting)), first_case, None):
        begin(number, case)
        try:
            yield from case.measure()
        except Exception as error:  # whatever it is, the other cases are wanted
            traceback.print_exc()
            note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            yield Row(what=case.what, case=case.case, note=note, failed=True)
