"""What goes to the workers: consecutive records of one input, and where they end in it."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """How far the inputs are read."""

    source: int = 0
    """Which of the inputs."""
    offset: int = 0
    """Bytes of its text read, decompressed."""
    records: int = 0
    """Lines or rows read."""
    crc32: int = 0
    """Of the text read."""
    bytes_read: int = 0
    """Bytes of the input read, as it lies on disk; not exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineBlock:
    """Consecutive whole lines of one file of JSON lines."""

    first_record: int
    """Number of the first line in its file, counted from 1."""
    num_bytes: int
    """Of text, decompressed."""
    end: Position
    """Behind the block."""
    lines: bytes
    """Each ends with a newline, the file's last one too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBlock:
    """Consecutive rows of one table."""

    first_record: int
    """Number of the first row in its file, counted from 1."""
    num_bytes: int
    """Of text, decompressed."""
    end: Position
    """Behind the block."""
    texts: dict[str, list[str | None]]
    """For each key the text of each row; None where it has none."""


Block = LineBlock | RowBlock
