"""The ranks of a run start alike, or not at all.

Each rank reads its flags and looks at its machine alone. Two that find different things would wait
for each other in different collectives until a timeout. So all tell rank 0 what they found before
the first collective, through torchrun's store, for which they need to agree on nothing:

1. Each adds a report to the store: its settings, or its error.
2. Rank 0 reads the reports as they arrive, until all are in or one is bad, and writes a verdict.
3. All ranks go on, or raise the verdict.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from megatron_memory.config.flags import all_flags
from megatron_memory.config.schema import Config
from megatron_memory.exceptions import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
_PACKAGES = ("torch", "megatron-core", "transformer-engine")
_MINUTES_TO_WAIT = 10
_SECONDS_TO_HEAR = 10
# torchrun shares its store with its processes, and after a restart still the first one (torch 2.13;
# pytorch issue 135712).
_STALE_STORE = (
    "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment on every node: without "
    "it restarted processes find the addresses of those before them, and fail. Set it and start "
    "again"
)


def start_alike(prepare: Callable[[], T], settings: Callable[[T], Mapping[str, str]]) -> T:
    """Prepare this rank, and return what that gives, if all ranks prepared the same.

    Does nothing more on one process, or without torchrun. Otherwise all ranks must call it, before
    torch.distributed is initialised.

    Args:
        prepare: on this rank alone.
        settings: name -> value of what must be the same on every rank.

    Raises:
        ConfigurationError: on every rank: `prepare` failed on one, or the settings differ.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        return prepare()
    found: dict[str, str] = {}
    failure: Exception | None = None
    try:
        _check_restarts()
        prepared = prepare()
        found.update(settings(prepared))
    # Whatever it is, the other ranks must hear of it, or they wait for this one.
    except Exception as error:
        failure = error
    own = Report(
        rank=int(os.environ["RANK"]),
        host=socket.gethostname(),
        settings=found,
        problem=None if failure is None else f"{type(failure).__name__}: {failure}",
    )
    problem = _agree_with_all(own)
    if failure is not None:
        raise failure
    if problem is not None:
        raise ConfigurationError(problem)
    return prepared


def _agree_with_all(own: "Report") -> str | None:
    from torch.distributed import DistError, PrefixStore, rendezvous

    # Rank 0 must be the first to lose patience: it can say who is missing.
    timeout = datetime.timedelta(minutes=2 * _MINUTES_TO_WAIT)
    try:
        store, _, world_size = next(rendezvous("env://", timeout=timeout))
        return agree(PrefixStore("start_alike", store), own, world_size)
    except DistError as error:
        return f"rank 0 does not answer ({error}). Look for its error on its node"


def settings_of(config: Config) -> dict[str, str]:
    """What must be the same on every rank of a training: flags, kind of device, packages.

    Raises:
        ConfigurationError: this machine has no such device.
    """
    found: dict[str, str] = {}
    for flag in all_flags().values():
        if not flag.option.may_differ:
            value = getattr(getattr(config, flag.component), flag.field.name)
            found[flag.spelled] = "not given" if value is None else str(value)
    if not config.training.dry_run:
        from megatron_memory.runtime import select_backend

        backend = select_backend(config.parallel.device, config.parallel.distributed_backend)
        found["the device"] = f"{backend.device.type} with {backend.distributed}"
    return found | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank found."""

    rank: int
    """Of the whole run."""
    host: str
    """Name of its machine."""
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What must be the same on every rank, by its name for the user."""
    problem: str | None = None
    """Why it cannot start."""


def agree(store: "Store", own: Report, world_size: int) -> str | None:
    """Why the ranks cannot start, or None; the same answer on every rank. A collective call.

    Args:
        store: that all ranks share and nobody has used for this before.
        own: this rank's report.
        world_size: how many ranks call.
    """
    arrived = store.add("arrived", 1)
    if arrived > world_size:
        return f"torchrun has restarted this run, which {_STALE_STORE}"
    store.set(f"report {arrived}", json.dumps(dataclasses.asdict(own)))
    if own.rank == 0:
        store.set("verdict", json.dumps(_verdict(store, world_size)))
    problem = json.loads(store.get("verdict"))
    # The store may end with rank 0, or with its node's torchrun.
    if store.add("heard", 1) == world_size:
        store.set("all heard", "")
    if own.rank == 0:
        _wait(store, "all heard", _SECONDS_TO_HEAR)
    return problem


def _verdict(store: "Store", world_size: int) -> str | None:
    reports: list[Report] = []
    deadline = time.monotonic() + 60 * _MINUTES_TO_WAIT
    while len(reports) < world_size:
        key = f"report {len(reports) + 1}"
        if not _wait(store, key, deadline - time.monotonic()):
            missing = set(range(world_size)) - {report.rank for report in reports}
            return (
                f"{_ranks(missing)} did not start within {_MINUTES_TO_WAIT} minutes of the others. "
                "Look for their errors on their nodes"
            )
        report = Report(**json.loads(store.get(key)))
        if report.problem is not None:
            return f"rank {report.rank} on {report.host} cannot start: {report.problem}"
        reports.append(report)
    return difference(reports)


def _wait(store: "Store", key: str, seconds: float) -> bool:
    from torch.distributed import DistStoreError

    try:
        store.wait([key], datetime.timedelta(seconds=max(1.0, seconds)))
    except DistStoreError:
        return False
    return True


def difference(reports: Iterable[Report]) -> str | None:
    """Which settings differ, and where each value is; None where all are the same."""
    reports = sorted(reports, key=lambda report: report.rank)
    names = dict.fromkeys(name for report in reports for name in report.settings)
    lines = []
    for name in names:
        places: dict[str, list[Report]] = {}
        for report in reports:
            places.setdefault(report.settings.get(name, "unknown"), []).append(report)
        if len(places) > 1:
            values = "; ".join(f"{value} on {_place(found)}" for value, found in places.items())
            lines.append(f"- {name}: {values}")
    if not lines:
        return None
    return "\n".join(
        [
            "The ranks of this run were started with different settings:",
            *lines,
            "Start every node with the same command, configuration file and installation.",
        ]
    )


def _place(reports: list[Report]) -> str:
    hosts = list(dict.fromkeys(report.host for report in reports))
    shown = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
    return f"{_ranks({report.rank for report in reports})} ({shown})"


def _ranks(ranks: set[int]) -> str:
    """`rank 3`, or `ranks 0 to 7, 16`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(f"{a} to {b}" if b > a else str(a) for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _check_restarts() -> None:
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigurationError(f"torchrun --max-restarts {restarts} {_STALE_STORE}")
