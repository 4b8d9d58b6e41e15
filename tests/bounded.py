"""Calls in a process of their own that may not take more memory than is said."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.memory_growth import growth


def within(most: int, call: Callable[[], Any]) -> int:
    """Call with at most `most` more bytes of address space, and say by how many resident ones it
    grew. What asks for more gets a MemoryError at once, whether it would use them or not."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most, before[1]))
    try:
        return growth(call)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
