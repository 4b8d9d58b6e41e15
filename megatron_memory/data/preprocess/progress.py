"""One line of progress every so many documents."""

import sys
import time
from typing import TextIO


class Progress:
    """Counts documents, bytes and tokens, and prints rates and the time left."""

    def __init__(
        self, total_bytes: int | None, log_interval: int, stream: TextIO | None = None
    ) -> None:
        """
        Args:
            total_bytes: size of all inputs as they lie on disk; None where it is not known.
            log_interval: documents between two lines.
            stream: where the lines go; None for standard error.
        """
        self.total_bytes = total_bytes
        self.log_interval = log_interval
        self.stream = stream or sys.stderr
        self.num_documents = 0
        self.num_bytes = 0
        self.num_tokens = 0
        self._begun_at = 0
        self._next_line = log_interval
        self._start = time.monotonic()

    def begin_at(self, bytes_read: int) -> None:
        """Leave out of the rates what an interrupted run has done."""
        self._begun_at = bytes_read

    def update(
        self, *, num_documents: int, num_bytes: int, num_tokens: int, bytes_read: int
    ) -> None:
        """Count a block.

        Args:
            num_documents, num_bytes, num_tokens: of the block; its bytes decompressed.
            bytes_read: how far the inputs are read.
        """
        self.num_documents += num_documents
        self.num_bytes += num_bytes
        self.num_tokens += num_tokens
        if self.num_documents >= self._next_line:
            self._next_line = (self.num_documents // self.log_interval + 1) * self.log_interval
            self._print(self._time_left(bytes_read))

    def finish(self, note: str) -> None:
        """Print the last line."""
        self._print(f"{note} after {format_seconds(self.seconds())}")

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def _time_left(self, bytes_read: int) -> str:
        if self.total_bytes is None:
            return f"{format_seconds(self.seconds())} so far"
        done = min(1.0, bytes_read / max(1, self.total_bytes))
        done_here = (bytes_read - self._begun_at) / max(1, self.total_bytes)
        left = self.seconds() * (1 - done) / max(done_here, 1e-9)
        return f"{done:.1%} done, {format_seconds(left)} left"

    def _print(self, note: str) -> None:
        seconds = max(self.seconds(), 1e-9)
        print(
            f"{self.num_documents:,} documents, {self.num_documents / seconds:,.0f} docs/s, "
            f"{self.num_bytes / seconds / 1e6:.2f} MB/s, "
            f"{self.num_tokens / seconds:,.0f} tokens/s, {note}",
            file=self.stream,
            flush=True,
        )


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}"
