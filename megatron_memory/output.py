"""Lines for the user where they may get lost: a full disk, a terminal or a pipe that is gone.

None of these is a reason to end a training, or to end it without its checkpoint and exit code.
"""

import contextlib
import io
import os
import sys
from typing import TextIO


def try_print(line: str, stream: TextIO) -> OSError | None:
    """Print a line.

    Returns:
        why it could not be written; what is lost by then may be more than this line.
    """
    try:
        print(line, file=stream, flush=True)
    except OSError as error:
        return error
    return None


def accept_any_text() -> None:
    """Print characters that the terminal's encoding lacks, and bytes of file names that are no
    text, as escapes: Python would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def let_go_of_output() -> None:
    """Drop what cannot be written before the process ends: Python would replace its exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
