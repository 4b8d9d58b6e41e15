"""Lines for the user where they may get lost: a full disk, a terminal or a pipe that is gone.

None of these is a reason to end a training, or to end it without its checkpoint and exit code.
"""

import codecs
import contextlib
import io
import os
import sys
from typing import TextIO

_ANY_TEXT = "memory_any_text"


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
    """Print file names that are no text as they are, and characters that the terminal's encoding
    lacks as escapes: Python would end the program."""
    codecs.register_error(_ANY_TEXT, _bytes_or_escapes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=_ANY_TEXT)


def _bytes_or_escapes(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError), "of a stream that is written to"
    found = b""
    for character in error.object[error.start : error.end]:
        # Where Python keeps the bytes of names that it cannot decode.
        is_byte = 0xDC80 <= ord(character) <= 0xDCFF
        how = "surrogateescape" if is_byte else "backslashreplace"
        found += character.encode("ascii", how)
    return found, error.end


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
