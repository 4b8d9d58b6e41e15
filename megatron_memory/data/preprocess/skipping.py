"""What becomes of bad lines."""

import sys

from megatron_memory.data.preprocess.documents import NUM_NAMED
from megatron_memory.data.preprocess.encoding import EncodedBlock
from megatron_memory.data.preprocess.inputs import is_table
from megatron_memory.exceptions import DataError


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

    def report(self, path: str, block: EncodedBlock) -> None:
        """Take note of the bad lines of a block.

        Raises:
            DataError: the first of them, where the run stops at bad lines.
        """
        before = self.count
        self.count += block.num_problems
        for number, problem in block.problems[: max(0, NUM_NAMED - before)]:
            message = f"{path}, {'row' if is_table(path) else 'line'} {number}: {problem}"
            if self.on_error == "stop":
                raise DataError(message)
            print(f"skipped: {message}", file=sys.stderr)
        if before <= NUM_NAMED < self.count:
            print("skipped: further bad lines are only counted", file=sys.stderr)

    def finish(self) -> None:
        """Say how many lines were left out."""
        if self.count:
            print(f"{self.count:,} bad lines skipped", file=sys.stderr)
