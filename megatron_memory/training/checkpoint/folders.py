"""The names in a checkpoint directory, and the order in which they appear and disappear.

Nothing here needs torch. Only one process may publish or prune.
"""

import os
import re
import shutil
from pathlib import Path

from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import read_bounded
from megatron_memory.reading.pickles import UnsafeFile

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "config.yaml"

_ITERATION = re.compile(r"iter_(\d{7,})")
_INCOMPLETE = ".incomplete"
_REPLACED = ".replaced"
_LONGEST_TRACKER = 100
"""Bytes."""
_LEFTOVER = re.compile(rf"iter_\d{{7,}}{re.escape(_INCOMPLETE)}(\..+)?")


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is once it is complete."""
    return root / f"iter_{iteration:07d}"


def incomplete_folder(root: Path, iteration: int, run: str | None = None) -> Path:
    """Where it is while it is written; a run has folders of its own."""
    folder = iteration_folder(root, iteration)
    return folder.with_name(folder.name + _INCOMPLETE + (f".{run}" if run else ""))


def iteration_of(folder: Path) -> int | None:
    """The iteration that a folder's name says; None for other folders."""
    match = _ITERATION.fullmatch(folder.name.removesuffix(_REPLACED))
    return int(match[1]) if match else None


def saved_iterations(root: Path) -> list[int]:
    """Iterations with a published checkpoint, ascending."""
    if not root.is_dir():
        return []
    found = {iteration_of(folder) for folder in root.iterdir() if folder.is_dir()}
    return sorted(iteration for iteration in found if iteration is not None)


def published_folder(root: Path, iteration: int) -> Path:
    """The folder of a published checkpoint, also where a crash interrupted its replacement."""
    folder = iteration_folder(root, iteration)
    replaced = folder.with_name(folder.name + _REPLACED)
    return replaced if replaced.is_dir() and not folder.is_dir() else folder


def read_tracker(root: Path) -> int | None:
    """The newest complete iteration; None where no checkpoint was ever completed.

    Raises:
        CheckpointError: the tracker does not hold a number.
    """
    return _read_iteration(root / TRACKER)


def _read_iteration(tracker: Path) -> int | None:
    try:
        text = read_bounded(tracker, _LONGEST_TRACKER).decode("ascii").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, UnsafeFile) as error:
        raise CheckpointError(
            f"{tracker} cannot be read: {error}. Write the iteration of a complete "
            f"checkpoint into it: {_listed(saved_iterations(tracker.parent))}"
        ) from error
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker} says {text[:40]!r}, which is not an iteration. Write the iteration "
            f"of a complete checkpoint into it: {_listed(saved_iterations(tracker.parent))}"
        )
    return int(text)


def _listed(iterations: list[int]) -> str:
    return ", ".join(map(str, iterations)) or "there is none"


def begin(root: Path, iteration: int, run: str | None = None) -> Path:
    """An empty folder to write a checkpoint into; leftovers of an interrupted one are removed."""
    folder = incomplete_folder(root, iteration, run)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def remove_leftovers(root: Path) -> list[str]:
    """Delete what unfinished saves left behind; for the only run that writes there.

    Call `finish_publishing` before.

    Returns:
        names of the folders.
    """
    names = sorted(f.name for f in root.iterdir() if _LEFTOVER.fullmatch(f.name) and f.is_dir())
    for name in names:
        # A dead run's writer may still be at it; its folder's name is not ours, so it may stay.
        shutil.rmtree(root / name, ignore_errors=True)
    for name in (TRACKER, CONFIG_FILE):
        for file in root.glob(f".{name}.*.tmp"):
            file.unlink(missing_ok=True)
    return names


def publish(root: Path, iteration: int, run: str | None = None) -> Path:
    """Give a completely written checkpoint its name, then point the tracker to it."""
    incomplete, folder = incomplete_folder(root, iteration, run), iteration_folder(root, iteration)
    _sync_to_disk(incomplete)
    # Before the folder has its name: `finish_publishing` finds it where this is interrupted.
    tracker = _write_next_tracker(root, iteration)
    try:
        _rename(incomplete, folder)
    except OSError:
        tracker.unlink(missing_ok=True)
        raise
    _put_tracker(root, tracker)
    return folder


def _rename(incomplete: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + _REPLACED)
    if folder.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.rename(folder, replaced)
    os.rename(incomplete, folder)
    if replaced.exists():
        shutil.rmtree(replaced)


def finish_publishing(root: Path) -> int | None:
    """Point the tracker to a complete checkpoint whose publication was interrupted.

    For the only run that writes there. Other checkpoints after the tracker's are left alone:
    somebody who wants to go back may have changed it by hand.

    Returns:
        the iteration; None where none was interrupted.
    """
    tracker, finished = root / TRACKER, None
    for file in sorted(root.glob(f".{TRACKER}.*.tmp"), key=_changed):
        try:
            iteration = _read_iteration(file)
        except CheckpointError:
            continue
        if iteration is None or not iteration_folder(root, iteration).is_dir():
            continue
        if not tracker.exists() or _changed(tracker) <= _changed(file):
            _put_tracker(root, file)
            finished = iteration
    return finished


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def write_tracker(root: Path, iteration: int) -> None:
    """Say which checkpoint is the newest, in one step."""
    _put_tracker(root, _write_next_tracker(root, iteration))


def _write_next_tracker(root: Path, iteration: int) -> Path:
    temporary = root / f".{TRACKER}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(f"{iteration}\n")
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _put_tracker(root: Path, written: Path) -> None:
    os.replace(written, root / TRACKER)
    _sync(root)


def _sync_to_disk(folder: Path) -> None:
    """The tensors' writers have synced their files; the small ones and the folder itself remain."""
    for file in folder.iterdir():
        if file.suffix != ".distcp":
            _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(root: Path, keep_last: int, newest: int, *, keep_before: int | None = None) -> list[int]:
    """Delete all but the `keep_last` newest checkpoints up to iteration `newest`.

    Checkpoints after it belong to another run of the same directory and stay. Those before
    iteration `keep_before` stay as well.

    Returns:
        the iterations deleted.
    """
    doomed = [i for i in saved_iterations(root) if i <= newest][:-keep_last]
    doomed = [i for i in doomed if keep_before is None or i >= keep_before]
    for iteration in doomed:
        folder = published_folder(root, iteration)
        # Renamed first, so that a checkpoint half deleted does not look like a whole one.
        leftover = incomplete_folder(root, iteration)
        if leftover.exists():
            shutil.rmtree(leftover)
        os.rename(folder, leftover)
        shutil.rmtree(leftover)
    return doomed
