"""Checksums by all ranks of a run: each sums what it has written, and compares a share of what is
loaded.

Both are done where a processor would wait: while the disk takes what was written, and beside the
one thread that loads.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.agreement import raise_on_all
from megatron_memory.training.checkpoint.checksums import (
    Digests,
    Place,
    Sums,
    all_places,
    decode,
    differing,
    encode,
    listed,
    read_sums,
    sum_files,
    sum_places,
    write_sums,
)

_PART = ".integrity_of_"


def with_sums(request: AsyncRequest, algorithm: str) -> AsyncRequest:
    """The same request to write a checkpoint, whose processes also sum what they have written."""
    if request.async_fn is None:
        return request
    # Of `write_in_processes`.
    write = partial(request.async_fn, leave_sums=partial(leave_sums, algorithm))
    return request._replace(async_fn=write)


def leave_sums(algorithm: str, path: Path) -> None:
    """Sum a file that was just written, and leave the sum beside it for `join_sums`."""
    part = path.with_name(f"{_PART}{path.name}")
    try:
        part.write_bytes(encode(sum_files(path.parent, [path.name], algorithm)))
    # On a full disk, say. Raised here it would leave the other ranks waiting; so rank 0 sums this
    # file, and hears of the disk itself.
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def join_sums(folder: Path, algorithm: str) -> None:
    """Write the sums of a checkpoint whose ranks have left theirs; on one rank, at the end.

    Files that nobody has summed are read: the small ones, and those of a rank that could not.
    """
    known: list[Sums] = []
    for part in folder.glob(f"{_PART}*"):
        # Cut off where the disk was full.
        with contextlib.suppress(ValueError):
            known.append(decode(part.read_bytes()))
        part.unlink()
    write_sums(folder, algorithm, known)


@contextlib.contextmanager
def compared_meanwhile(
    folder: Path, common: Mapping[str, Any], advice: Callable[[], str]
) -> Iterator[bool]:
    """Compare every file of a checkpoint with its sum while it is read, each rank a share of the
    bytes. What was read must not be used before this ends.

    Collective at its begin and end. Ranks that see the same files share the work; where nodes have
    copies of their own, the ranks of each compare the whole copy.

    Args:
        folder: of the checkpoint.
        common: its plain values.
        advice: what to do where it is damaged; called on all ranks.

    Yields:
        False for a checkpoint that was written without sums.

    Raises:
        CheckpointError: on every rank; it names every file that is missing, extra or damaged. In
            place of what reading a damaged file has raised, where that is a CheckpointError, too.
    """
    sums = _read_sums_together(folder, common, advice)
    if sums is None:
        yield False
        return
    mine, stop = _ranks_with(folder), threading.Event()
    with ThreadPoolExecutor(1, initializer=_give_way) as pool:
        summing = pool.submit(_sum_share, folder, sums, mine, stop)
        try:
            yield True
        except CheckpointError:
            # The damage says more than what it has led to.
            _raise_differing(folder, sums, summing, mine, advice)
            raise
        except BaseException:
            stop.set()
            raise
        _raise_differing(folder, sums, summing, mine, advice)


def _read_sums_together(
    folder: Path, common: Mapping[str, Any], advice: Callable[[], str]
) -> Sums | None:
    sums, problem = None, None
    try:
        sums = read_sums(folder, common)
    except CheckpointError as error:
        problem = str(error)
    _raise_on_all(problem, advice)
    return sums


def _ranks_with(folder: Path) -> list[int]:
    """The ranks that see the same files as this one."""
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, _identity(folder))
    return [rank for rank, identity in enumerate(seen) if identity == seen[dist.get_rank()]]


def _give_way() -> None:
    """Let this thread, and those it starts, run where a processor would be idle: what loads comes
    first."""
    # Of other systems the whole process would give way.
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _sum_share(folder: Path, sums: Sums, ranks: list[int], stop: threading.Event) -> Digests:
    """This rank's share of what so many sum."""
    places = shares(all_places(folder, sums), len(ranks))[ranks.index(dist.get_rank())]
    return sum_places(folder, places, sums.algorithm, _threads(), stop)


def _raise_differing(
    folder: Path,
    sums: Sums,
    summing: Future[Digests],
    mine: list[int],
    advice: Callable[[], str],
) -> None:
    problem, digests = None, {}
    try:
        digests = summing.result()
    except OSError as error:
        problem = f"{error.filename} cannot be read: {error.strerror}"
    _raise_on_all(problem, advice)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, digests)
    found: Digests = {}
    for rank in mine:
        found |= parts[rank]
    problems = differing(folder, sums, found)
    _raise_on_all(listed(problems) if problems else None, advice)


def _raise_on_all(problem: str | None, advice: Callable[[], str]) -> None:
    try:
        raise_on_all(problem)
    except CheckpointError as error:
        raise CheckpointError(f"{error}.{advice()}") from None


def _identity(folder: Path) -> tuple[int, ...]:
    """Alike for ranks that see the same files; a copy has another time of change."""
    status = (folder / ".metadata").stat()
    return status.st_ino, status.st_ctime_ns, status.st_size


def _threads() -> int:
    """Those that this rank may use beside the one that loads."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(1, min(8, (os.cpu_count() or 1) // local - 1))


def shares(places: Mapping[Place, int], number: int) -> list[list[Place]]:
    """The blocks in `number` shares of nearly as many bytes."""
    filled = [0] * number
    parts: list[list[Place]] = [[] for _ in range(number)]
    for place in sorted(places, key=lambda place: (-places[place], place)):
        least = filled.index(min(filled))
        filled[least] += places[place]
        parts[least].append(place)
    return parts
