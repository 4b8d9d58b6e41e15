"""Reads lines of text files, in order, in blocks that are worth sending to another process."""

import contextlib
import dataclasses
import gzip
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from megatron_memory.data.preprocess.inputs import STANDARD_INPUT
from megatron_memory.exceptions import DataError

_BLOCK_BYTES = 512 * 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """How far the inputs are read."""

    source: int = 0
    """Which of the inputs."""
    offset: int = 0
    """Bytes of its text read, decompressed."""
    records: int = 0
    """Lines read."""
    crc32: int = 0
    """Of the text read."""
    bytes_read: int = 0
    """Bytes of the input read, as it lies on disk; not exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineBlock:
    """Consecutive whole lines of one file."""

    path: str
    first_record: int
    """Number of the first line in its file, counted from 1."""
    lines: bytes
    """Each ends with a newline, the file's last one too."""
    end: Position
    """Behind the block."""


def read_blocks(paths: list[str], start: Position | None = None) -> Iterator[LineBlock]:
    """All lines of `paths` in order, from `start` on.

    Raises:
        DataError: a file cannot be read or decompressed, or is not what it was up to `start`.
    """
    position = start or Position()
    for source in range(position.source, len(paths)):
        if source != position.source:
            position = Position(source=source)
        try:
            with _opened(paths[source]) as (stream, raw):
                _skip(paths[source], stream, position, seekable=stream is raw and raw.seekable())
                yield from _read_file(paths[source], stream, raw, position)
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(
                f"--input {paths[source]}: cannot be read ({error}). A compressed file may be cut "
                "off: test it with gzip -t or zstd -t, and copy or make it again"
            ) from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The text of a file and the file itself, the same stream where nothing is compressed."""
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(path, "rb") as raw:
        if path.endswith(".gz"):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)), raw
        else:
            yield raw, raw


def _skip(path: str, stream: BinaryIO, position: Position, *, seekable: bool) -> None:
    """Go to a position; what is read on the way must be what was read before."""
    if position.offset == 0:
        return
    if seekable:
        stream.seek(position.offset)
        return
    left, checksum = position.offset, 0
    while left and (piece := stream.read(min(left, _BLOCK_BYTES))):
        left -= len(piece)
        checksum = zlib.crc32(piece, checksum)
    if left or checksum != position.crc32:
        raise DataError(
            f"--input {path}: is not what the interrupted run read. Give it the same input, or "
            "start over without --resume"
        )


def _read_file(
    path: str, stream: BinaryIO, raw: BinaryIO, position: Position
) -> Iterator[LineBlock]:
    for lines in _whole_lines(stream):
        first = position.records + 1
        complete = lines.endswith(b"\n")
        position = Position(
            source=position.source,
            offset=position.offset + len(lines),
            records=position.records + lines.count(b"\n") + (not complete),
            crc32=zlib.crc32(lines, position.crc32),
            bytes_read=raw.tell() if raw.seekable() else 0,
        )
        lines = lines if complete else lines + b"\n"
        yield LineBlock(path=path, first_record=first, lines=lines, end=position)


def _whole_lines(stream: BinaryIO) -> Iterator[bytes]:
    pending: list[bytes] = []
    while chunk := stream.read(_BLOCK_BYTES):
        end = chunk.rfind(b"\n") + 1
        if end == 0:
            pending.append(chunk)
            continue
        yield b"".join((*pending, chunk[:end]))
        pending = [chunk[end:]] if end < len(chunk) else []
    if pending:
        yield b"".join(pending)
