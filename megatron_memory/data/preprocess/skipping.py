"""What becomes of bad lines."""

import sys

from megatron_memory.data.preprocess.inputs import is_table
from megatron_memory.exceptions import DataError

_NUM_SHOWN = 10


class SkippedLines:
    """Stops the run at a bad line, or reports the first ten and counts the rest."""

    def __init__(self, on_error: str, num_before: int) -> None:
        """
        Args:
            on_error: `stop` or `skip`.
            num_before: lines that an interrupted run has left out.
        """
        self.on_error = on_error
        self.count = num_before

    def report(self, path: str, problems: list[tuple[int, str]]) -> None:
        """Take note of the bad lines of a block.

        Raises:
            DataError: the first of them, where the run stops at bad lines.
        """
        for number, problem in problems:
            message = f"{path}, {'row' if is_table(path) else 'line'} {number}: {problem}"
            if self.on_error == "stop":
                raise DataError(message)
            self.count += 1
            if self.count <= _NUM_SHOWN:
                print(f"skipped: {message}", file=sys.stderr)
            elif self.count == _NUM_SHOWN + 1:
                print("skipped: further bad lines are only counted", file=sys.stderr)

    def finish(self) -> None:
        """Say how many lines were left out."""
        if self.count:
            print(f"{self.count:,} bad lines skipped", file=sys.stderr)
