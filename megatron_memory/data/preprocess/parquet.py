"""Reads the text columns of Parquet tables."""

import os
import zlib
from collections.abc import Iterator
from typing import Any

from megatron_memory.data.preprocess.blocks import Position, RowBlock
from megatron_memory.exceptions import DataError
from megatron_memory.optional import require

_BLOCK_BYTES = 512 * 1024
_BUFFER_BYTES = 1 << 20


def read_table(path: str, keys: tuple[str, ...], position: Position) -> Iterator[RowBlock]:
    """The rows of a table from a position on.

    Row groups are read one after the other, and each in pieces: what is in memory is a page of each
    column and a block.

    Raises:
        ConfigurationError: pyarrow is not installed.
        DataError: the table is damaged, or lacks a column of text.
    """
    parquet = require("pyarrow")
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table:
            _check_columns(path, table, keys)
            yield from _read_rows(path, table, keys, position)
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
    path: str, table: Any, keys: tuple[str, ...], position: Position
) -> Iterator[RowBlock]:
    to_skip = position.records
    file_bytes, num_rows = os.path.getsize(path), max(1, table.metadata.num_rows)
    for number in range(table.num_row_groups):
        group = table.metadata.row_group(number)
        if to_skip >= group.num_rows:
            to_skip -= group.num_rows
            continue
        rows_per_block = group.num_rows * _BLOCK_BYTES // max(1, _text_bytes(group, keys))
        for batch in table.iter_batches(
            max(1, rows_per_block), row_groups=[number], columns=list(keys), use_threads=False
        ):
            texts = {key: batch.column(key)[to_skip:].to_pylist() for key in keys}
            skipped, to_skip = min(to_skip, len(batch)), max(0, to_skip - len(batch))
            if skipped < len(batch):
                first = position.records + 1
                read = first - 1 + len(batch) - skipped
                position, num_bytes = _advance(position, read, texts, file_bytes * read // num_rows)
                yield RowBlock(first_record=first, num_bytes=num_bytes, end=position, texts=texts)


def _text_bytes(group: Any, keys: tuple[str, ...]) -> int:
    """Bytes of the text columns of a row group, decompressed."""
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in keys)


def _advance(
    position: Position, records: int, texts: dict[str, list[str | None]], bytes_read: int
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
