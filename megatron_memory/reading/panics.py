"""Libraries in Rust that panic, as errors that programs catch."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

from megatron_memory.reading.pickles import UnsafeFile

Argument = TypeVar("Argument")
Result = TypeVar("Result")


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Libraries in Rust panic where they do not expect a value; Python sees it as an exception that
    `except Exception` lets through.

    Raises:
        UnsafeFile: in place of a panic.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UnsafeFile(f"the library that reads it fails: {error}") from error


def without_panics(function: Callable[[Argument], Result]) -> Callable[[Argument], Result]:
    """The function with UnsafeFile in place of a panic: definitions that load may still panic on a
    text, or on ids."""

    @functools.wraps(function)
    def wrapped(argument: Argument) -> Result:
        with panics_as_errors():
            return function(argument)

    return wrapped
