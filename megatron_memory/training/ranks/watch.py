"""The thread of each rank that tells the others how it is, and ends the process with the run.

Rank 0 judges. The others ask for its verdict, and judge themselves where it is silent. What they
tell each other goes through torch's store, which needs neither the main thread nor a GPU.
"""

import contextlib
import dataclasses
import datetime
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_memory.exceptions import USER_ERRORS
from megatron_memory.output import try_print
from megatron_memory.runtime import processes
from megatron_memory.training.ranks.beat import ENDED, LOST, RUNNING, Beat, whereabouts
from megatron_memory.training.ranks.launcher import LauncherBeats
from megatron_memory.training.ranks.verdict import View, find_culprits

EXIT_RANK_FAILED = 4
_MOST_SECONDS_BETWEEN_BEATS = 2.0
_SECONDS_TO_HEAR = 5.0
_SECONDS_TO_DUMP = 10.0
_SIGNS_OF_LOSS = ("Connection", "connection", "Timed out", "Broken pipe", "Socket", "NCCL", "Gloo")

_num_watches = 0


class RankWatch:
    """Entered around what a rank does together with the others.

    Args:
        timeout: seconds without progress, --rank-timeout; 0: nobody is watched.
        folder: stacks are written to a new folder there.
    """

    def __init__(self, timeout: float, folder: Path):
        self._timeout, self._folder = timeout, folder
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._is_on = timeout > 0 and self._world_size > 1
        self._interval = min(_MOST_SECONDS_BETWEEN_BEATS, timeout / 10)
        self._phase, self._iteration, self._progress = "starting", 0, 0
        self._state, self._error = RUNNING, ""
        self._stopped = threading.Event()
        self._number = 0
        self._seen: dict[int, _Seen] = {}
        self._main_thread = threading.get_ident()

    def __enter__(self) -> "RankWatch":
        global _num_watches
        self._launcher = LauncherBeats()
        if self._is_on:
            _num_watches += 1
            # Its own connection: the main thread may hold the other one while it waits.
            store: Any = dist.distributed_c10d._get_default_store()
            store = store.clone()
            # No call may block this thread for as long as a collective may take.
            store.set_timeout(datetime.timedelta(seconds=max(1.0, self._timeout / 2)))
            self._store = dist.PrefixStore(f"rank_watch_{_num_watches}", store)
            self._began = time.monotonic()
            self._tell()
            self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._launcher.stop()
        if not self._is_on:
            return
        if error is not None and _is_loss(error):
            self._state, self._error = LOST, _one_line(error)
            # Whoever is to blame is named in a moment, by the thread, which ends the process.
            self._stopped.wait(2 * self._timeout + _SECONDS_TO_HEAR)
        self._error = "" if error is None else _one_line(error)
        self._state = ENDED
        self._stopped.set()
        self._thread.join(self._timeout)

    def advance(self, iteration: int | None = None) -> None:
        """There is progress: a microbatch, or an iteration is complete."""
        self._progress += 1
        self._launcher.beat()
        if iteration is not None:
            self._iteration, self._phase = iteration, "training"

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the rank does while this is entered; before the first step it still starts."""
        before = self._phase
        self._phase = before if before == "starting" else name
        self._progress += 1
        try:
            yield
        finally:
            self._phase = before
            self._progress += 1

    def _run(self) -> None:
        failing_since: float | None = None
        while True:
            last = self._stopped.wait(self._interval)
            try:
                self._tell()
                if last:
                    return
                self._judge()
                failing_since = None
            except (dist.DistError, RuntimeError) as error:
                if last:
                    return
                # The store is in rank 0's process, or in the launcher's of its node.
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > min(10.0, self._timeout / 2):
                    self._end(_without_store(error, self._new_folder()))

    def _tell(self) -> None:
        self._number += 1
        waits, at = whereabouts(self._main_thread, threading.get_ident())
        beat = Beat(
            number=self._number,
            progress=self._progress,
            phase=self._phase,
            iteration=self._iteration,
            state=self._state,
            error=self._error,
            waits=waits,
            at=at,
            host=socket.gethostname(),
            machine=processes.machine(),
            pid=os.getpid(),
            started=processes.started(os.getpid()),
        )
        self._store.set(f"beat {self._rank}", json.dumps(dataclasses.asdict(beat)))

    def _judge(self) -> None:
        if self._store.check(["verdict"]):
            self._end(_Verdict(**json.loads(self._store.get("verdict"))))
        if self._rank > 0 and not self._is_first_rank_silent():
            return
        views = {rank: self._look_at(rank) for rank in range(self._world_size)}
        culprits = find_culprits(views, self._timeout)
        if culprits:
            self._end(self._publish(views, culprits))

    def _is_first_rank_silent(self) -> bool:
        """Whether another rank must judge: it is a little later than rank 0 would be."""
        first = self._look_at(0)
        if first.beat is None:
            return False
        return first.beat.state == ENDED or first.is_dead or first.silent_for > self._interval * 5

    def _look_at(self, rank: int) -> View:
        key, now = f"beat {rank}", time.monotonic()
        seen = self._seen.setdefault(rank, _Seen(heard=now, moved=now))
        if self._store.check([key]):
            beat = Beat(**json.loads(self._store.get(key)))
            if seen.beat is None or beat.number != seen.beat.number:
                seen.heard = now
            if seen.beat is None or beat.progress != seen.beat.progress:
                seen.moved = now
            seen.beat = beat
        found = seen.beat
        return View(
            beat=found,
            silent_for=now - seen.heard,
            still_for=now - seen.moved,
            is_dead=found is not None and _is_dead(found),
        )

    def _publish(self, views: dict[int, View], culprits: dict[int, str]) -> "_Verdict":
        hosts, places = {}, {}
        for rank, view in views.items():
            if view.beat is not None:
                hosts[rank], places[rank] = view.beat.host, _whereabouts_of(view.beat)
        verdict = _Verdict(
            culprits=culprits,
            hosts=hosts,
            places=places,
            folder=self._new_folder(),
        )
        text = json.dumps(dataclasses.asdict(verdict))
        # Two that judge at once must not name two folders.
        first = self._store.compare_set("verdict", "", text)
        return _Verdict(**json.loads(first))

    def _new_folder(self) -> str:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        return str(self._folder / f"rank-failure-{stamp}")

    def _end(self, verdict: "_Verdict") -> None:
        """Say what happened, write this process's stacks, let the others hear it, and end."""
        lines = [*verdict.lines(), *self._dump(verdict.folder)]
        try_print("\n".join(f"rank {self._rank}: {line}" for line in lines), sys.stderr)
        with contextlib.suppress(dist.DistError, RuntimeError):
            num_others = self._world_size - len(verdict.culprits)
            self._store.add("heard", 1)
            deadline = time.monotonic() + _SECONDS_TO_HEAR
            # The store may end with rank 0.
            while self._store.add("heard", 0) < num_others and time.monotonic() < deadline:
                time.sleep(0.05)
        os._exit(EXIT_RANK_FAILED)

    def _dump(self, folder: str) -> list[str]:
        said: list[str] = []
        # A disk that hangs may be the reason for all this.
        writer = threading.Thread(target=self._write_stacks, args=(folder, said), daemon=True)
        writer.start()
        writer.join(_SECONDS_TO_DUMP)
        return said or [f"its stacks could not be written to {folder}"]

    def _write_stacks(self, folder: str, said: list[str]) -> None:
        path = Path(folder) / f"rank_{self._rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                print(f"rank {self._rank} on {socket.gethostname()}, {self._phase},", file=file)
                print(f"iteration {self._iteration} completed {self._error}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
            said.append(f"stacks of every rank that can be reached: {path.parent}")
        except OSError as error:
            said.append(f"stacks could not be written: {error}")


@dataclasses.dataclass
class _Seen:
    heard: float
    moved: float
    beat: Beat | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Verdict:
    """What one rank has found, for all; JSON makes texts of ranks."""

    culprits: dict[Any, str]
    hosts: dict[Any, str]
    folder: str
    places: dict[Any, str] = dataclasses.field(default_factory=dict)
    launcher: str = ""
    """What is wrong with it, where that is to blame."""

    def lines(self) -> list[str]:
        hosts = {int(rank): host for rank, host in self.hosts.items()}
        places = {int(rank): place for rank, place in self.places.items()}
        launcher = [f"RankError: {self.launcher}"] if self.launcher else []
        return launcher + [
            f"RankError: rank {rank} on {hosts.get(int(rank), 'an unknown host')} {reason}"
            + (f" ({places[int(rank)]})" if int(rank) in places else "")
            for rank, reason in self.culprits.items()
        ]


def _is_dead(beat: Beat) -> bool:
    is_here = beat.machine == processes.machine()
    return is_here and processes.started(beat.pid) != beat.started


def _whereabouts_of(beat: Beat) -> str:
    return f"{beat.phase}, iteration {beat.iteration} completed, at {beat.at}"


def _without_store(error: Exception, folder: str) -> _Verdict:
    what = f"the store through which ranks talk is gone ({_one_line(error)})"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        launcher = f"torchrun on the first node does not answer any more: {what}"
        return _Verdict(culprits={}, hosts={}, folder=folder, launcher=launcher)
    reason = f"does not answer any more: {what}, which is in its process"
    return _Verdict(culprits={0: reason}, hosts={}, folder=folder)


def _is_loss(error: BaseException) -> bool:
    if isinstance(error, USER_ERRORS) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(s in str(error) for s in _SIGNS_OF_LOSS)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
