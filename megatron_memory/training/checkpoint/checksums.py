"""Checksums of a checkpoint's files: written with it, compared before anything is read from it.

The file has the name and the layout of megatron-core's own since 0.19, and what that writes, with
SHA-256, is compared as well. By default the sums are XXH3-128 of blocks: eight times as fast as
SHA-256, and the blocks of one file can be read by several ranks. They find damage, not a forger.

| key | meaning |
|---|---|
| `algorithm` | a key of ALGORITHMS |
| `files` | sum by name, of every other file in the folder |
| `sizes` | bytes by name; not in megatron-core's |
| `sum` | of the three above, so that a flipped bit in this file is found; not in megatron-core's |
"""

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from megatron_memory.exceptions import CheckpointError

SUMS_FILE = "integrity.json"
MARK = "checksums"
"""Key of a checkpoint's plain values which says that it was written with sums."""
NO_SUMS = (
    "{} was written without checksums: whether its tensors are what was written cannot be told"
)
"""What is said of such a folder."""

_READ_AT_ONCE = 1 << 20
_LARGEST_SUMS_FILE = 1 << 28
# What NFS leaves in place of a file that was deleted while it was open. Nobody reads it.
_LEFT_BY_NFS = re.compile(r"\.nfs[0-9a-f]{8,}")

Place = tuple[str, int]
"""A file's name and the number of a block in it."""
Digests = dict[Place, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """How a file is summed."""

    new: Callable[..., Any]
    """Makes an object with `update` and `hexdigest`, of the bytes that it is given first."""
    block_size: int | None
    """A file's sum is that of its blocks' sums, in order. None: it is one block, summed once."""


ALGORITHMS = {
    "xxh3_128": Algorithm(new=xxhash.xxh3_128, block_size=1 << 26),
    "sha256": Algorithm(new=hashlib.sha256, block_size=None),
}


_OF_MEGATRON = "sha256"
"""Of megatron-core's own files, which have no sum of themselves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sums:
    """What the file with the sums says."""

    algorithm: str
    """A key of ALGORITHMS."""
    files: dict[str, str]
    """Sum of each file, by its name."""
    sizes: dict[str, int]
    """Bytes of each file; empty where megatron-core wrote the sums."""


def sum_files(folder: Path, names: Iterable[str], algorithm: str, threads: int = 1) -> Sums:
    """The sums of some files, read now by so many threads.

    Raises:
        OSError: one cannot be read.
    """
    sizes = {name: (folder / name).stat().st_size for name in sorted(names)}
    places = {name: places_of(name, size, algorithm) for name, size in sizes.items()}
    every = [place for of_file in places.values() for place in of_file]
    digests = sum_places(folder, every, algorithm, threads)
    files = {name: combine(digests, of_file, algorithm) for name, of_file in places.items()}
    return Sums(algorithm=algorithm, files=files, sizes=sizes)


def write_sums(folder: Path, algorithm: str, known: Iterable[Sums] = ()) -> None:
    """Sum every file of a checkpoint that is complete but for this.

    Args:
        folder: of the checkpoint.
        algorithm: a key of ALGORITHMS.
        known: sums of some of its files, which need not be read again.
    """
    files: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for part in known:
        assert part.algorithm == algorithm, "the parts of a checkpoint are summed alike"
        files |= part.files
        sizes |= part.sizes
    rest = sum_files(folder, _names(folder) - files.keys(), algorithm)
    whole = Sums(algorithm=algorithm, files={**files, **rest.files}, sizes={**sizes, **rest.sizes})
    (folder / SUMS_FILE).write_bytes(encode(whole))


def encode(sums: Sums) -> bytes:
    """A file's content."""
    parts = _parts(sums)
    return json.dumps(parts | {"sum": _own_sum(parts)}, indent=1, sort_keys=True).encode()


def _parts(sums: Sums) -> dict[str, Any]:
    return {"algorithm": sums.algorithm, "files": sums.files, "sizes": sums.sizes}


def _own_sum(parts: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def decode(content: bytes) -> Sums:
    """What a file says.

    Raises:
        ValueError: it is damaged.
    """
    try:
        parts = json.loads(content)
        algorithm, files = parts["algorithm"], parts["files"]
        sums = Sums(algorithm=algorithm, files=dict(files), sizes=dict(parts.get("sizes", {})))
        is_known = algorithm in ALGORITHMS
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from None
    if not is_known:
        raise ValueError(f"its algorithm is {str(algorithm)[:40]!r}, known are {[*ALGORITHMS]}")
    is_megatrons = algorithm == _OF_MEGATRON and parts.keys() == {"algorithm", "files"}
    if not is_megatrons and content != encode(sums):
        raise ValueError("its own sum is not that of its content")
    if not all(isinstance(text, str) for item in sums.files.items() for text in item):
        raise ValueError("a sum is no text")
    if not all(isinstance(size, int) and size >= 0 for size in sums.sizes.values()):
        raise ValueError("a size is no number of bytes")
    return sums


def read_sums(folder: Path, common: Mapping[str, Any]) -> Sums | None:
    """The sums that a checkpoint was written with, after its files have been counted.

    Args:
        folder: of the checkpoint.
        common: its plain values, which say whether there are sums.

    Returns:
        None for a checkpoint that was written without.

    Raises:
        CheckpointError: the sums are missing or damaged, or a file is missing, extra, truncated or
            too long.
    """
    path = folder / SUMS_FILE
    try:
        if not path.is_file():
            if path.is_symlink() or path.exists() or common.get(MARK):
                raise CheckpointError(f"{path} is missing: the checkpoint was written with it")
            return None
        if path.stat().st_size > _LARGEST_SUMS_FILE:
            raise CheckpointError(f"{path} is damaged: {path.stat().st_size} bytes")
        sums = decode(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    problems = _count(folder, sums)
    if problems:
        raise CheckpointError(listed(problems))
    return sums


def _count(folder: Path, sums: Sums) -> list[str]:
    present = _names(folder)
    problems = [
        f"{folder / name} is not of this checkpoint: {SUMS_FILE} does not name it. Move it away"
        for name in sorted(present - sums.files.keys())
    ]
    for name in sorted(sums.files):
        # Also keeps a name from leading out of the folder. A link counts as what it leads to, which
        # must have the sum; one to a pipe or a device is not read.
        if name not in present or not (folder / name).is_file():
            problems.append(f"{folder / name} is missing")
            continue
        size = (folder / name).stat().st_size
        expected = sums.sizes.get(name, size)
        if size != expected:
            what = "truncated" if size < expected else "too long"
            problems.append(f"{folder / name} is {what}: {size} bytes of {expected}")
    return problems


def _names(folder: Path) -> set[str]:
    """Everything in a folder, subfolders too, but for the sums."""
    return {
        name
        for name in os.listdir(folder)
        if name != SUMS_FILE and not _LEFT_BY_NFS.fullmatch(name)
    }


def listed(problems: list[str]) -> str:
    """The first problems, as one text."""
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    return "; ".join(problems[:8]) + more


def places_of(name: str, size: int, algorithm: str) -> list[Place]:
    """The blocks of a file; an empty one has one."""
    block = ALGORITHMS[algorithm].block_size
    number = 1 if block is None else max(1, -(-size // block))
    return [(name, index) for index in range(number)]


def sum_places(
    folder: Path,
    places: list[Place],
    algorithm: str,
    threads: int = 1,
    stop: threading.Event | None = None,
) -> Digests:
    """Read blocks and sum each. `stop`: set where nobody waits for the sums any more.

    Raises:
        OSError: one cannot be read.
    """
    if threads <= 1 or len(places) <= 1:
        return {place: _sum_place(folder, place, algorithm, stop) for place in places}
    # Reading and summing both let other threads run.
    with ThreadPoolExecutor(min(threads, len(places))) as pool:
        digests = pool.map(lambda place: _sum_place(folder, place, algorithm, stop), places)
        return dict(zip(places, digests, strict=True))


def _sum_place(folder: Path, place: Place, algorithm: str, stop: threading.Event | None) -> str:
    name, index = place
    how = ALGORITHMS[algorithm]
    left = how.block_size
    hasher, buffer = how.new(), memoryview(bytearray(_READ_AT_ONCE))
    with open(folder / name, "rb", buffering=0) as file:
        start = index * (how.block_size or 0)
        file.seek(start)
        if hasattr(os, "posix_fadvise"):
            # The disk reads ahead while this sums: its own 128 KiB are too few for several threads.
            os.posix_fadvise(file.fileno(), start, left or 0, os.POSIX_FADV_WILLNEED)
        while (left is None or left > 0) and not (stop and stop.is_set()):
            count = file.readinto(buffer if left is None else buffer[:left])
            if not count:
                break
            hasher.update(buffer[:count])
            left = None if left is None else left - count
    return hasher.hexdigest()


def combine(digests: Digests, places: list[Place], algorithm: str) -> str:
    """A file's sum, of its blocks' sums."""
    how = ALGORITHMS[algorithm]
    if how.block_size is None:
        (place,) = places
        return digests[place]
    return how.new("".join(digests[place] for place in places).encode()).hexdigest()


def all_places(folder: Path, sums: Sums) -> dict[Place, int]:
    """Every block of a checkpoint and its bytes."""
    block = ALGORITHMS[sums.algorithm].block_size
    places = {}
    for name in sorted(sums.files):
        size = (folder / name).stat().st_size
        for place in places_of(name, size, sums.algorithm):
            places[place] = size if block is None else min(block, size - place[1] * block)
    return places


def differing(folder: Path, sums: Sums, digests: Digests) -> list[str]:
    """What is wrong with a checkpoint, whose blocks have these sums."""
    by_file: dict[str, list[Place]] = {name: [] for name in sums.files}
    for place in sorted(digests):
        by_file[place[0]].append(place)
    return [
        f"{folder / name} is damaged: its content is not what was written ({sums.algorithm})"
        for name, places in sorted(by_file.items())
        if not places or combine(digests, places, sums.algorithm) != sums.files[name]
    ]


def check_sums(
    folder: Path, common: Mapping[str, Any], only: Callable[[str], bool] | None = None
) -> bool:
    """Compare every file of a checkpoint with its sum, on this process alone.

    Args:
        folder: of the checkpoint.
        common: its plain values.
        only: which files to read, by name; all are counted.

    Returns:
        False for a checkpoint that was written without sums: nothing is known of it.

    Raises:
        CheckpointError: it names every file that is missing, extra or damaged.
    """
    sums = read_sums(folder, common)
    if sums is None:
        return False
    if only is not None:
        files = {name: text for name, text in sums.files.items() if only(name)}
        sums = dataclasses.replace(sums, files=files)
    try:
        places = [*all_places(folder, sums)]
        digests = sum_places(folder, places, sums.algorithm, min(8, os.cpu_count() or 1))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    problems = differing(folder, sums, digests)
    if problems:
        raise CheckpointError(listed(problems))
    return True
