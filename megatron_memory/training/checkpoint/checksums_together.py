"""Checksums by all ranks of a run: each sums what it has written, and compares a share of what is
loaded."""

import contextlib
import os
from collections.abc import Mapping
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

_PART = ".integrity_of_rank_"


def with_sums(request: AsyncRequest, folder: Path, algorithm: str) -> AsyncRequest:
    """The same request to write a checkpoint, that sums what this rank has written behind it: in
    the process that writes, while the bytes are still in memory."""
    if request.async_fn is None:
        return request
    rank, threads = dist.get_rank(), _threads()
    write = partial(_write_and_sum, request.async_fn, folder, rank, algorithm, threads)
    return request._replace(async_fn=write)


def _write_and_sum(
    write, folder: Path, rank: int, algorithm: str, threads: int, *args, **kwargs
) -> None:
    write(*args, **kwargs)
    part = folder / f"{_PART}{rank}"
    try:
        # torch names a rank's files by it.
        names = [file.name for file in folder.glob(f"__{rank}_*")]
        part.write_bytes(encode(sum_files(folder, names, algorithm, threads)))
    # On a full disk, say. Raised here it would leave the other ranks waiting; so rank 0 sums these
    # files, and hears of the disk itself.
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


def check_sums_together(folder: Path, common: Mapping[str, Any]) -> bool:
    """Compare every file of a checkpoint with its sum, each rank a share of the bytes.

    A collective call. Ranks that see the same files share the work; where nodes have copies of
    their own, the ranks of each compare the whole copy.

    Returns:
        False for a checkpoint that was written without sums.

    Raises:
        CheckpointError: on every rank; it names every file that is missing, extra or damaged.
    """
    sums, problem, digests = None, None, {}
    try:
        sums = read_sums(folder, common)
    except CheckpointError as error:
        problem = str(error)
    raise_on_all(problem)
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, None if sums is None else _identity(folder))
    mine = [rank for rank, identity in enumerate(seen) if identity == seen[dist.get_rank()]]
    if sums is not None:
        try:
            places = shares(all_places(folder, sums), len(mine))[mine.index(dist.get_rank())]
            digests = sum_places(folder, places, sums.algorithm, _threads())
        except OSError as error:
            problem = f"{error.filename} cannot be read: {error.strerror}"
    raise_on_all(problem)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, digests)
    if sums is not None:
        found: Digests = {}
        for rank in mine:
            found |= parts[rank]
        problems = differing(folder, sums, found)
        problem = listed(problems) if problems else None
    raise_on_all(problem)
    return sums is not None


def _identity(folder: Path) -> tuple[int, ...]:
    """Alike for ranks that see the same files; a copy has another time of change."""
    status = (folder / ".metadata").stat()
    return status.st_ino, status.st_ctime_ns, status.st_size


def _threads() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return max(1, min(8, (os.cpu_count() or 1) // local))


def shares(places: Mapping[Place, int], number: int) -> list[list[Place]]:
    """The blocks in `number` shares of nearly as many bytes."""
    filled = [0] * number
    parts: list[list[Place]] = [[] for _ in range(number)]
    for place in sorted(places, key=lambda place: (-places[place], place)):
        least = filled.index(min(filled))
        filled[least] += places[place]
        parts[least].append(place)
    return parts
