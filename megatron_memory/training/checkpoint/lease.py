"""One run writes to `--save` at a time.

The run that writes holds `writer.json`, which names it and whose time of change is its heartbeat. A
run that finds the file decides whether its owner lives:

- on this machine by the process: its number, and when it started, for numbers are used again;
- on another one by the heartbeat, which the file system's own clock dates: machines' clocks differ.

Where somebody has deleted the file, or the whole folder, the run takes the right again, unless
another run has been there meanwhile: one that writes holds the file, and one that has ended has
left another tracker.
"""

import contextlib
import dataclasses
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_memory.exceptions import CheckpointError
from megatron_memory.runtime.processes import machine, started
from megatron_memory.training.checkpoint import folders

LEASE_FILE = "writer.json"
_SECONDS_BETWEEN_BEATS = 5.0
_SECONDS_UNTIL_DEAD = 60.0
"""Without a heartbeat. A network file system may show a new one half a minute late."""
_NO_LINKS_HERE = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that writes."""

    run: str
    """Name of the run, a new one at each start."""
    host: str
    """Of the process, for the user."""
    machine: str
    """Where process numbers mean the same: the kernel's start, and its namespace of processes."""
    pid: int
    started: str
    """When the process started, by its kernel."""

    def __str__(self) -> str:
        return f"run {self.run}, process {self.pid} on {self.host}"


class Lease:
    """The right to write to a folder, until it is released or this process ends.

    Args:
        root: the folder; made where it is missing.
        say: told before waiting for another run's heartbeat, and of a file that was deleted.

    Raises:
        CheckpointError: another run holds it.
        OSError: the folder cannot be written to.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda line: None):
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / LEASE_FILE
        self.owner = _this_process()
        self._say = say
        self._released = threading.Event()
        while not self._create():
            seen = _read(self.path)
            if seen is not None:
                self._require_dead(*seen, say)
                self._take_from(seen[0])
        self._device = root.stat().st_dev
        self.remember()
        self._heart = threading.Thread(target=self._beat, name="lease of --save", daemon=True)
        self._heart.start()

    @property
    def run(self) -> str:
        """Name of the run that holds it."""
        return self.owner.run

    def remember(self) -> None:
        """What this run has just written there is its own: see `require`."""
        self._tracker = _version(self.path.with_name(folders.TRACKER))

    def require(self) -> None:
        """That it is still this run's: a run that was stopped for a while may have lost it.

        A file that somebody has deleted is written again, and so is the folder.

        Raises:
            CheckpointError: another run has taken it, or has written there.
            OSError: the folder is gone and cannot be made.
        """
        seen = _read(self.path)
        if seen is None:
            seen = self._take_again()
        if seen is None or seen[0] != self.owner:
            now = "another run has saved there since" if seen is None else f"{seen[0]} holds it now"
            raise CheckpointError(
                f"{self.path} is no longer this run's ({now}), so that this run may not write "
                "there any more. Go on from the newest checkpoint with --load when nobody writes"
            )

    def _take_again(self) -> tuple[Owner | None, float] | None:
        """Who holds it now; None: nobody, and this run may not."""
        root = self.path.parent
        root.mkdir(parents=True, exist_ok=True)
        if root.stat().st_dev != self._device:
            raise OSError(errno.ESTALE, "another file system was there before", str(root))
        if not self._create():
            return _read(self.path)
        # Looked at only now, when no other run can be writing any more.
        tracker = _version(root / folders.TRACKER)
        is_empty = tracker is None and not folders.saved_iterations(root)
        if tracker != self._tracker and not is_empty:
            self._remove_own()
            return None
        self._say(f"{self.path} was deleted: this run writes it again, for no other run has it")
        return _read(self.path)

    def release(self) -> None:
        """Let others write. Doing it again changes nothing."""
        if self._released.is_set():
            return
        self._released.set()
        self._remove_own()

    def _remove_own(self) -> None:
        seen = _read(self.path)
        if seen is not None and seen[0] == self.owner:
            self.path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._released.wait(_SECONDS_BETWEEN_BEATS):
            # A disk that fails for a while is no reason to end here: `require` finds what was lost.
            with contextlib.suppress(OSError):
                seen = _read(self.path)
                # It may be deleted and written again.
                if seen is not None and seen[0] == self.owner:
                    os.utime(self.path)

    def _create(self) -> bool:
        """Whether the file was made, with its content from the first moment."""
        text = json.dumps(dataclasses.asdict(self.owner))
        with _temporary(self.path, text) as temporary:
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS_HERE:
                    raise
                return _create_without_links(self.path, text)
        return True

    def _require_dead(self, owner: Owner | None, beat: float, say: Callable[[str], None]) -> None:
        here = self.owner
        if owner is not None and owner.machine == here.machine:
            now = started(owner.pid)
            alive = owner.pid != here.pid and now != "" and now == owner.started
        else:
            alive = self._hear(owner, beat, say)
        if alive:
            raise CheckpointError(
                f"--save {self.path.parent}: another run writes there ({owner or 'unknown'}). Wait "
                f"for it, end it, or give another --save; if it has ended, delete {self.path}"
            )

    def _hear(self, owner: Owner | None, beat: float, say: Callable[[str], None]) -> bool:
        """Whether there is a new heartbeat before the owner counts as dead."""
        silent = _now(self.path) - beat
        if silent >= _SECONDS_UNTIL_DEAD:
            return False
        seconds = _SECONDS_UNTIL_DEAD - max(0.0, silent)
        say(f"{self.path}: waiting for a sign of life of {owner or 'its owner'}, {seconds:.0f} s")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, _SECONDS_BETWEEN_BEATS))
            seen = _read(self.path)
            if seen is None:
                return False
            if seen != (owner, beat):
                return True
        return False

    def _take_from(self, dead: Owner | None) -> None:
        """Remove a dead run's file, and no other that took its place meanwhile."""
        aside = self.path.with_name(f".{LEASE_FILE}.{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            seen = _read(aside)
            if seen is not None and seen[0] != dead:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)


def _this_process() -> Owner:
    return Owner(
        run=uuid.uuid4().hex[:12],
        host=socket.gethostname(),
        machine=machine(),
        pid=os.getpid(),
        started=started(os.getpid()),
    )


def _read(path: Path) -> tuple[Owner | None, float] | None:
    """The owner, None where the file does not say, and the last heartbeat; None: no file."""
    try:
        # Opened first: a network file system then asks its server for the time, too. Waits for no
        # pipe that somebody put there.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            beat, content = os.fstat(file.fileno()).st_mtime, file.read(10_000)
    except FileNotFoundError:
        return (None, os.lstat(path).st_mtime) if path.is_symlink() else None
    try:
        owner = Owner(**json.loads(content))
        valid = all(isinstance(v, str) for k, v in vars(owner).items() if k != "pid")
        return (owner if valid and isinstance(owner.pid, int) else None), beat
    except (ValueError, TypeError, RecursionError):
        return None, beat


def _version(file: Path) -> tuple[int, int] | None:
    """Another one after each time that the file was written; None where it is missing."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _now(path: Path) -> float:
    """By the clock that dates the files there."""
    with _temporary(path, "") as temporary:
        return temporary.stat().st_mtime


@contextlib.contextmanager
def _temporary(path: Path, text: str) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, "utf-8")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _create_without_links(path: Path, text: str) -> bool:
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True
