"""What a rank tells the others: that it lives, how far it is, and whether it waits for them."""

import dataclasses
import linecache
import sys
from types import FrameType

_WAITING_FILES = ("/torch/distributed/", "/torch/cuda/")
_WAITING_LINES = (".item()", ".tolist()", "synchronize(", ".wait(", "all_reduce(", "barrier(")
"""On a GPU a rank waits for the others where it first needs a number of theirs."""
_MAX_DEPTH = 12

RUNNING, ENDED, LOST = "running", "ended", "lost"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beat:
    """One rank at one moment."""

    number: int
    """Grows with every beat."""
    progress: int
    """Grows with every microbatch, batch of an evaluation and change of phase."""
    phase: str
    """What it does, a key of `verdict.ALLOWANCES`."""
    iteration: int
    """The last one completed."""
    state: str
    """RUNNING; ENDED: it has left the training; LOST: it could not reach another rank."""
    error: str
    """Of ENDED and LOST; empty for a rank that came to its end."""
    waits: bool
    """Whether it is in a call that needs other ranks."""
    at: str
    """Where its main thread is: file, line and function."""
    host: str
    machine: str
    """See `runtime.processes`."""
    pid: int
    started: str


def whereabouts(main_thread: int, own_thread: int) -> tuple[bool, str]:
    """`Beat.waits` and `Beat.at` of this process; calls nothing that could wait itself."""
    frames = sys._current_frames()
    main = frames.get(main_thread)
    if main is None:
        return False, "no main thread"
    others = [frame for thread, frame in frames.items() if thread not in (main_thread, own_thread)]
    # Autograd's threads call collectives from hooks, while the main thread waits for them.
    waits = _waits(main, lines=True) or any(_waits(frame, lines=False) for frame in others)
    return waits, _place(main)


def _waits(frame: FrameType | None, *, lines: bool) -> bool:
    innermost = frame
    for _ in range(_MAX_DEPTH):
        if frame is None:
            break
        if any(part in frame.f_code.co_filename for part in _WAITING_FILES):
            return True
        frame = frame.f_back
    if not lines or innermost is None:
        return False
    line = linecache.getline(innermost.f_code.co_filename, innermost.f_lineno)
    return any(text in line for text in _WAITING_LINES)


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
