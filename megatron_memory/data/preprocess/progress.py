"""One line of progress every so many documents."""

import sys
import time
from typing import TextIO


class Progress:
    """Counts documents and bytes, and prints rates and the time left."""

    def __init__(self, total_bytes: int, log_interval: int, stream: TextIO | None = None) -> None:
        """
        Args:
            total_bytes: size of all inputs as they lie on disk.
            log_interval: documents between two lines.
            stream: where the lines go; None for standard error.
        """
        self.total_bytes = total_bytes
        self.log_interval = log_interval
        self.stream = stream or sys.stderr
        self.num_documents = 0
        self.num_bytes = 0
        self._next_line = log_interval
        self._start = time.monotonic()

    def update(self, num_documents: int, num_bytes: int, bytes_read: int) -> None:
        """Count a batch: its documents, its bytes decompressed, and how far the inputs are read."""
        self.num_documents += num_documents
        self.num_bytes += num_bytes
        if self.num_documents >= self._next_line:
            self._next_line = (self.num_documents // self.log_interval + 1) * self.log_interval
            done = min(1.0, bytes_read / max(1, self.total_bytes))
            left = self.seconds() * (1 - done) / max(done, 1e-9)
            self._print(f"{done:.1%} done, {format_seconds(left)} left")

    def finish(self, note: str) -> None:
        """Print the last line."""
        self._print(f"{note} after {format_seconds(self.seconds())}")

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def _print(self, note: str) -> None:
        seconds = max(self.seconds(), 1e-9)
        print(
            f"{self.num_documents:,} documents, {self.num_documents / seconds:,.0f} docs/s, "
            f"{self.num_bytes / seconds / 1e6:.2f} MB/s, {note}",
            file=self.stream,
            flush=True,
        )


def format_seconds(seconds: float) -> str:
    """Hours, minutes and seconds, as 1:02:03."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_left:02}"
