"""Reads the inputs, in order, in blocks that are worth sending to another process."""

import zlib
from collections.abc import Iterator
from typing import BinaryIO

from megatron_memory.data.preprocess.blocks import Block, LineBlock, Position
from megatron_memory.data.preprocess.inputs import STANDARD_INPUT, is_table
from megatron_memory.data.preprocess.parquet import read_table
from megatron_memory.data.preprocess.streams import open_text
from megatron_memory.exceptions import DataError

_BLOCK_BYTES = 512 * 1024


def read_blocks(
    paths: list[str], keys: tuple[str, ...], start: Position | None = None
) -> Iterator[Block]:
    """All records of `paths` in order, from `start` on.

    Args:
        paths: of `expand_inputs`.
        keys: the columns to read of tables.

    Raises:
        ConfigurationError: a package that reads a kind of file is not installed.
        DataError: a file cannot be read or decompressed, or is not what it was up to `start`.
    """
    position = start or Position()
    for source in range(position.source, len(paths)):
        if source != position.source:
            position = Position(source=source)
        if is_table(paths[source]):
            yield from read_table(paths[source], keys, position)
        else:
            yield from _read_lines(paths[source], position)


def _read_lines(path: str, position: Position) -> Iterator[LineBlock]:
    try:
        with open_text(path) as (stream, raw):
            _skip(path, stream, position, seekable=stream is raw and raw.seekable())
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
                yield LineBlock(
                    first_record=first,
                    num_bytes=len(lines),
                    end=position,
                    lines=lines if complete else lines + b"\n",
                )
    except (EOFError, OSError) as error:
        raise DataError(
            f"--input {path}: cannot be read ({error}). A compressed file may be cut "
            "off: test it with gzip -t or zstd -t, and copy or make it again"
        ) from error


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
