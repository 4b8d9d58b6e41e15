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
class RecordLimit:
    """How long a line, or the texts of a row, may be."""

    max_bytes: int
    """Without a line's end."""
    skips: bool = False
    """Whether a longer one is left out, and not an error."""

    @property
    def problem(self) -> str:
        """Of a longer one, for the user."""
        return (
            f"longer than --max-document-bytes {self.max_bytes:,}. Raise the flag, or leave such "
            "records out with --on-error skip"
        )


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
    problem: str | None = None
    """What is wrong with the block's only record, which was not read; `lines` is then empty."""


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
    problem: str | None = None
    """As of a LineBlock; `texts` has no rows then."""


Block = LineBlock | RowBlock
