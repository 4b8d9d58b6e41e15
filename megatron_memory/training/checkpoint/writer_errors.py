"""Errors of the disk while a checkpoint is written: none is lost, none leaves ranks waiting.

megatron-core 0.16 hands other ranks the errors of the processes that write tensors, though not
their causes: of a full disk torch's writer says "unexpected pos". Errors of what rank 0 alone
does (it lists the folder, and writes `common.pt`, `.metadata` and `metadata.json`) it raises there,
while the other ranks wait. Here
the former keep their cause, and the latter are kept until all ranks ask for them.
"""

import errno
import re
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_memory.training.checkpoint.writer_processes import write_in_processes
from megatron_memory.upstream import fitting

checkpoints = fitting("checkpoints")

_MEANINGS = {
    errno.ENOSPC: "There is no space left: delete something, or lower --keep-last",
    errno.EDQUOT: "The quota is used up: delete something, or ask for more",
    errno.EROFS: "The file system can only be read: mount it for writing again",
    errno.EACCES: "Writing is not permitted there: give this user the permission",
    errno.EPERM: "Writing is not permitted there: give this user the permission",
    errno.EFBIG: "Files may not be that large there: raise ulimit -f, or use another file system",
    errno.EIO: "The disk, or the network to it, fails: look at the kernel's log",
    errno.ENOENT: "The folder is gone: has another program, or somebody, deleted it?",
    errno.ESTALE: "The network file system has lost the folder: mount it again",
}
_NOT_OF_DISK = (
    "No disk says so: a process that writes was ended, or had too little memory. Look at the "
    "kernel's log, and leave more memory free"
)
_REST = "Check the folder, its space and its permissions"

_kept: list[BaseException] = []


def install() -> None:
    """Fit megatron-core's writer; doing it again changes nothing."""
    if not hasattr(FileSystemWriterAsync.write_preloaded_data, "keeps_causes"):
        write = _with_causes(FileSystemWriterAsync.write_preloaded_data)
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
        setattr(FileSystemWriterAsync, checkpoints.WRITERS, staticmethod(write_in_processes))
        checkpoints.install()
        checkpoints.list_by(_ListedPath)
    for owner, name in checkpoints.written_by_first_rank():
        if not hasattr(getattr(owner, name), "keeps_errors"):
            setattr(owner, name, _kept_for_later(getattr(owner, name)))


def forget() -> None:
    """Before a save."""
    _kept.clear()


def raise_kept() -> None:
    """Raise what rank 0 could not write since `forget`.

    Raises:
        OSError: with its cause's number.
    """
    if _kept:
        raise _root_cause(_kept[0])


def meaning(text: str) -> str:
    """What to do about an error, from its text as Python writes it."""
    number = re.search(r"\[Errno (\d+)\]", text)
    return advice(int(number[1])) if number else _NOT_OF_DISK


def advice(number: int | None) -> str:
    """What to do about an error of the system, by its number."""
    return _REST if number is None else _MEANINGS.get(number, _REST)


class _ListedPath(type(Path())):  # type: ignore[misc]
    """What megatron-core lists on rank 0 before it writes: a folder that may be gone by then."""

    def iterdir(self) -> Iterator[Path]:
        try:
            yield from super().iterdir()
        except OSError as error:
            _kept.append(error)


def _kept_for_later(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def keep(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        # RuntimeError: torch's writer.
        except (OSError, RuntimeError) as error:
            _kept.append(error)
        return None

    keep.keeps_errors = True  # type: ignore[attr-defined]
    return keep


def _with_causes(function: Callable[..., None]) -> Callable[..., None]:
    @wraps(function)
    def write(*args: Any, results_queue: Any, **kwargs: Any) -> None:
        function(*args, results_queue=_CauseQueue(results_queue), **kwargs)

    write.keeps_causes = True  # type: ignore[attr-defined]
    return write


class _CauseQueue:
    """What a writer says its result to: an error goes on as its cause, for pickling drops that."""

    def __init__(self, queue: Any):
        self._queue = queue

    def put(self, item: tuple[int, Any]) -> None:
        number, outcome = item
        self._queue.put((number, _root_cause(outcome) if _is_error(outcome) else outcome))


def _is_error(outcome: Any) -> bool:
    return isinstance(outcome, Exception)


def _root_cause(error: BaseException) -> OSError:
    """The system's error behind others; the error's own text where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen
        seen = seen.__cause__ or seen.__context__
    return OSError(f"{type(error).__name__}: {error}")
