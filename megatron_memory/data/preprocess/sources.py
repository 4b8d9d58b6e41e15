"""Reads lines of text files, in order, in batches that are worth sending to another process."""

import dataclasses
import glob
import gzip
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, cast

from megatron_memory.exceptions import ConfigurationError, DataError

_BATCH_BYTES = 256 * 1024
_NOT_READ = (".zst", ".zstd", ".parquet", ".bz2", ".xz", ".zip", ".tar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineBatch:
    """Consecutive lines of one file."""

    path: str
    first_line: int
    """Number of `lines[0]` in its file, counted from 1."""
    lines: list[bytes]
    """Without their line ends."""
    bytes_read: int
    """Bytes of all inputs, as they lie on disk, read up to the end of this batch."""


def expand_inputs(inputs: Iterable[str]) -> list[str]:
    """Files named by `inputs`, patterns expanded and sorted.

    Raises:
        ConfigurationError: a kind of file that is not read.
        DataError: a name or pattern that matches no file.
    """
    paths: list[str] = []
    for name in inputs:
        found = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))
        if not found:
            raise DataError(f"--input {name}: no such file. Give .jsonl or .jsonl.gz files")
        paths += found
    for path in paths:
        if path.endswith(_NOT_READ):
            raise ConfigurationError(
                f"--input {path}: only .jsonl and .jsonl.gz are read; convert it to one of them"
            )
    return paths


def read_batches(paths: list[str]) -> Iterator[LineBatch]:
    """All lines of `paths` in order.

    Raises:
        DataError: a file cannot be read or decompressed.
    """
    bytes_before = 0
    for path in paths:
        try:
            with open(path, "rb") as raw:
                yield from _read_file(path, raw, bytes_before)
                bytes_before += os.fstat(raw.fileno()).st_size
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(
                f"--input {path}: cannot be read ({error}). A .gz file may be cut off: test it "
                "with gzip -t, and copy or make it again"
            ) from error


def _read_file(path: str, raw: BinaryIO, bytes_before: int) -> Iterator[LineBatch]:
    stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if path.endswith(".gz") else raw
    first_line, lines, num_bytes = 1, [], 0
    for line in stream:
        lines.append(line.rstrip(b"\r\n"))
        num_bytes += len(line)
        if num_bytes >= _BATCH_BYTES:
            yield LineBatch(
                path=path, first_line=first_line, lines=lines, bytes_read=bytes_before + raw.tell()
            )
            first_line, lines, num_bytes = first_line + len(lines), [], 0
    if lines:
        yield LineBatch(
            path=path, first_line=first_line, lines=lines, bytes_read=bytes_before + raw.tell()
        )
