"""Reads the inputs, in order, in blocks that are worth sending to another process."""

import dataclasses
import errno
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from megatron_memory.data.preprocess.blocks import Block, LineBlock, Position, RecordLimit
from megatron_memory.data.preprocess.inputs import STANDARD_INPUT, is_table
from megatron_memory.data.preprocess.parquet import read_table
from megatron_memory.data.preprocess.streams import open_text
from megatron_memory.exceptions import DataError

_BLOCK_BYTES = 512 * 1024


def read_blocks(
    paths: list[str],
    keys: tuple[str, ...],
    start: Position | None = None,
    *,
    limit: RecordLimit,
) -> Iterator[Block]:
    """All records of `paths` in order, from `start` on.

    Args:
        paths: of `expand_inputs`.
        keys: the columns to read of tables.
        limit: of a record, which bounds the memory.

    Raises:
        ConfigurationError: a package that reads a kind of file is not installed.
        DataError: a file cannot be read or decompressed, or is not what it was up to `start`; or a
            line is longer than the limit, unless such ones are skipped.
    """
    position = start or Position()
    for source in range(position.source, len(paths)):
        if source != position.source:
            position = Position(source=source)
        if is_table(paths[source]):
            yield from read_table(paths[source], keys, position, limit)
        else:
            yield from _read_lines(paths[source], position, limit)


def _read_lines(path: str, position: Position, limit: RecordLimit) -> Iterator[LineBlock]:
    begun = 0
    try:
        with open_text(path) as (stream, raw):
            _skip(path, stream, position, seekable=stream is raw and raw.seekable())
            for piece in _pieces(stream, limit.max_bytes):
                first, data = position.records + 1, piece.data
                if piece.is_long and not limit.skips:
                    # At once: it may never end.
                    raise DataError(f"{path}, line {first}: {limit.problem}")
                complete = data.endswith(b"\n")
                position = Position(
                    source=position.source,
                    offset=position.offset + len(data),
                    records=position.records + _num_records(piece),
                    crc32=zlib.crc32(data, position.crc32),
                    bytes_read=raw.tell() if raw.seekable() else 0,
                )
                begun += len(data)
                if piece.is_end:
                    num_bytes, begun = begun, 0
                    yield LineBlock(
                        first_record=first,
                        num_bytes=num_bytes,
                        end=position,
                        lines=b"" if piece.is_long else data if complete else data + b"\n",
                        problem=limit.problem if piece.is_long else None,
                    )
    except (EOFError, OSError) as error:
        raise DataError(f"--input {path}: cannot be read ({error}). {_advice(error)}") from error


def _advice(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "Raise the limit of open files: ulimit -n"
    return (
        "A compressed file may be cut off: test it with gzip -t or zstd -t, and copy or make it "
        "again"
    )


def _skip(path: str, stream: BinaryIO, position: Position, *, seekable: bool) -> None:
    """Go to a position; what is read on the way must be what was read before."""
    if position.offset == 0:
        return
    if seekable and path != STANDARD_INPUT:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """Whole lines, or a part of one that is too long."""

    data: bytes
    is_long: bool = False
    is_end: bool = True
    """Whether the next piece begins with a line."""


def _num_records(piece: _Piece) -> int:
    if piece.is_long:
        return int(piece.is_end)
    return piece.data.count(b"\n") + (not piece.data.endswith(b"\n"))


def _pieces(stream: BinaryIO, max_bytes: int) -> Iterator[_Piece]:
    """All of a stream; no more is held than a line of `max_bytes` and two blocks."""
    pending: list[bytes] = []
    num_pending, in_long = 0, False
    while chunk := stream.read(_BLOCK_BYTES):
        if in_long:
            end = chunk.find(b"\n") + 1
            in_long = end == 0
            yield _Piece(data=chunk[:end] if end else chunk, is_long=True, is_end=end > 0)
            chunk = chunk[end:] if end else b""
        end = chunk.rfind(b"\n") + 1
        if end:
            yield from _without_long(b"".join((*pending, chunk[:end])), max_bytes)
            pending, num_pending, chunk = [], 0, chunk[end:]
        if chunk:
            pending.append(chunk)
            num_pending += len(chunk)
        if num_pending > max_bytes:
            yield _Piece(data=b"".join(pending), is_long=True, is_end=False)
            pending, num_pending, in_long = [], 0, True
    if in_long:
        yield _Piece(data=b"", is_long=True)
    elif pending:
        yield from _without_long(b"".join(pending), max_bytes)


def _without_long(lines: bytes, max_bytes: int) -> Iterator[_Piece]:
    """Whole lines, those that are too long by themselves."""
    if len(lines) <= max_bytes:
        yield _Piece(data=lines)
        return
    begin = end = 0
    while end < len(lines):
        line_begin = end
        end = lines.find(b"\n", line_begin) + 1 or len(lines)
        content = end - line_begin - lines.endswith(b"\n", line_begin, end)
        if content > max_bytes:
            if begin < line_begin:
                yield _Piece(data=lines[begin:line_begin])
            yield _Piece(data=lines[line_begin:end], is_long=True)
            begin = end
    if begin < end:
        yield _Piece(data=lines[begin:end])
