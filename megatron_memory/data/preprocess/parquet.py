"""Reads the text columns of Parquet tables."""

import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from megatron_memory.data.preprocess.blocks import Position, RecordLimit, RowBlock
from megatron_memory.data.preprocess.parquet_pages import largest_page
from megatron_memory.exceptions import DataError
from megatron_memory.optional import require

Texts = dict[str, list[str | None]]
"""For each key the text of each of some rows."""

_BLOCK_BYTES = 512 * 1024
_BUFFER_BYTES = 1 << 20
_MOST_ROWS = 1 << 14
_ROW_BYTES = 8
_MOST_BATCH_BYTES = 16 << 20
_PAGES_PER_RECORD = 8


def read_table(
    path: str, keys: tuple[str, ...], position: Position, limit: RecordLimit
) -> Iterator[RowBlock]:
    """The rows of a table from a position on.

    Row groups are read one after the other, and each in pieces: what is in memory is a page of each
    column and a block. A page is at most `_PAGES_PER_RECORD` times the limit of a record.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the table is damaged, lacks a column of text, or has a page that is too large.
    """
    parquet = require("pyarrow")
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            _check_columns(path, table, keys)
            yield from _read_rows(path, table, keys, position, limit)
    # ArrowInvalid is a ValueError, ArrowNotImplementedError a NotImplementedError.
    except (ValueError, NotImplementedError, OSError) as error:
        raise DataError(
            f"--input {path}: cannot be read as Parquet ({error}). Copy or make it again"
        ) from error


def _check_columns(path: str, table: Any, keys: tuple[str, ...]) -> None:
    schema = table.schema_arrow
    for key in keys:
        if schema.names.count(key) != 1:
            raise DataError(
                f"--input {path}: has no column {key!r}, only {', '.join(schema.names) or 'none'}. "
                "Give the columns that hold text to --json-keys"
            )
        kind = str(schema.field(key).type)
        if kind not in ("string", "large_string", "string_view"):
            raise DataError(
                f"--input {path}: column {key!r} holds {kind}, not strings. Make it a column of "
                "strings, or name another in --json-keys"
            )


def _read_rows(
    path: str, table: Any, keys: tuple[str, ...], position: Position, limit: RecordLimit
) -> Iterator[RowBlock]:
    file_bytes, num_rows = os.path.getsize(path), max(1, table.metadata.num_rows)
    batches = _batches(path, table, keys, position.records, limit)
    parts = (part for batch in batches for part in _parts(batch, limit.max_bytes))
    for texts, is_long in _joined(parts):
        first = position.records + 1
        read = position.records + len(texts[keys[0]])
        position, num_bytes = _advance(position, read, texts, file_bytes * read // num_rows)
        yield RowBlock(
            first_record=first,
            num_bytes=num_bytes,
            end=position,
            texts={key: [] for key in keys} if is_long else texts,
            problem=limit.problem if is_long else None,
        )


def _batches(
    path: str, table: Any, keys: tuple[str, ...], to_skip: int, limit: RecordLimit
) -> Iterator[Texts]:
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        if to_skip >= group.num_rows:
            to_skip -= group.num_rows
            continue
        for batch in table.iter_batches(
            _rows_at_once(path, number, group, keys, limit),
            row_groups=[number],
            columns=list(keys),
            use_threads=False,
        ):
            if to_skip < len(batch):
                yield {key: batch.column(key)[to_skip:].to_pylist() for key in keys}
            to_skip = max(0, to_skip - len(batch))


def _rows_at_once(
    path: str, number: int, group: Any, keys: tuple[str, ...], limit: RecordLimit
) -> int:
    """Rows of a batch, so that it is about a block, and bounded whatever the encoding: a text is
    at most as long as its page, but a dictionary's or a common beginning can be in every row."""
    columns = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema in keys]
    with open(path, "rb") as stream:
        largest = max(1, *(largest_page(stream, column) for column in columns), 1)
    if largest > _PAGES_PER_RECORD * limit.max_bytes:
        raise DataError(
            f"--input {path}: row group {number} has a page of {largest:,} bytes, which is read "
            f"whole; with --max-document-bytes {limit.max_bytes:,} a page may have "
            f"{_PAGES_PER_RECORD} times as many. Write the table with smaller pages, or raise "
            "the flag"
        )
    num_bytes = sum(column.total_uncompressed_size for column in columns)
    about_a_block = group.num_rows * _BLOCK_BYTES // max(1, num_bytes)
    return max(1, min(about_a_block, _MOST_ROWS, _MOST_BATCH_BYTES // largest))


def _parts(texts: Texts, max_bytes: int) -> Iterator[tuple[Texts, bool]]:
    """A batch's rows; those whose texts are too long by themselves, and marked so."""
    begin, num_rows = 0, len(next(iter(texts.values())))
    for row in range(num_rows):
        of_row = [column[row] or "" for column in texts.values()]
        # No character has more than four bytes.
        if 4 * sum(map(len, of_row)) <= max_bytes:
            continue
        if sum(len(text.encode("utf-8", "surrogatepass")) for text in of_row) > max_bytes:
            if begin < row:
                yield {key: column[begin:row] for key, column in texts.items()}, False
            yield {key: column[row : row + 1] for key, column in texts.items()}, True
            begin = row + 1
    if begin < num_rows:
        yield {key: column[begin:] for key, column in texts.items()}, False


def _joined(parts: Iterable[tuple[Texts, bool]]) -> Iterator[tuple[Texts, bool]]:
    """Parts that follow each other, until they are about a block."""
    pending: Texts = {}
    num_characters = 0
    for texts, is_long in parts:
        if is_long:
            if pending:
                yield pending, False
            yield texts, True
            pending, num_characters = {}, 0
            continue
        for key, column in texts.items():
            pending.setdefault(key, []).extend(column)
            # A row without a text takes memory, too.
            num_characters += sum(len(text or "") + _ROW_BYTES for text in column)
        if num_characters >= _BLOCK_BYTES:
            yield pending, False
            pending, num_characters = {}, 0
    if pending:
        yield pending, False


def _advance(
    position: Position, records: int, texts: Texts, bytes_read: int
) -> tuple[Position, int]:
    """The position behind some rows, and the bytes of their texts."""
    offset, checksum = position.offset, position.crc32
    for column in texts.values():
        # An end behind each, so that moving text from one row to another changes the checksum.
        data = "".join(f"{text or ''}\x1e" for text in column).encode("utf-8", "surrogatepass")
        checksum = zlib.crc32(data, checksum)
        offset += len(data)
    end = Position(
        source=position.source,
        offset=offset,
        records=records,
        crc32=checksum,
        bytes_read=bytes_read,
    )
    return end, offset - position.offset
