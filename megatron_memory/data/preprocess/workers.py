"""An ordered map over processes that never hangs: a dead worker ends it, with the reason."""

import gc
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_memory.exceptions import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Batches in flight or waiting for an earlier one, for each worker: bounds the memory held.
_LOOKAHEAD = 4
_JOIN_SECONDS = 5


class WorkerError(RuntimeError):
    """A worker process died, or failed on something other than the data."""


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], num_workers: int
) -> Generator[Result, None, None]:
    """Results of `function(item)` in the order of `items`.

    With one worker everything happens in this process, else in `num_workers` others, each with its
    own copy of the function. Close the iterator (contextlib.closing) to stop them early.

    Raises:
        DataError: raised by the function, of any subclass; the first one in the order of `items`.
        WorkerError: a worker was killed or failed otherwise.
    """
    if num_workers == 1:
        yield from map(function, items)
        return
    pool = _Pool(function, num_workers)
    try:
        yield from pool.map(items)
    finally:
        pool.close()


class _Pool:
    """Workers with one item each at a time: neither side ever blocks on a full pipe."""

    def __init__(self, function: Callable, num_workers: int) -> None:
        # Forked workers inherit what is imported and loaded, which costs seconds, and a function
        # need not be picklable.
        self.processes: dict[Connection, Any] = {}
        try:
            self._start(function, num_workers)
        except OSError as error:
            self.close()
            raise WorkerError(
                f"--workers {num_workers}: they cannot be started ({error}). Use fewer, or raise "
                "the limit (ulimit -n: open files, -u: processes, -v: memory)"
            ) from error

    def _start(self, function: Callable, num_workers: int) -> None:
        context: Any = multiprocessing.get_context("fork")
        for number in range(num_workers):
            ours, theirs = context.Pipe()
            inherited = (*self.processes, ours)
            process = context.Process(
                target=_work,
                args=(function, theirs, inherited),
                name=f"tokenizer worker {number}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self.processes[ours] = process

    def map(self, items: Iterable[Item]) -> Iterator[Any]:
        numbered = enumerate(items)
        idle = list(self.processes)
        busy: set[Connection] = set()
        finished: dict[int, tuple[str, Any]] = {}
        next_result, exhausted = 0, False
        limit = _LOOKAHEAD * len(self.processes)
        sent = 0
        while True:
            while idle and not exhausted and sent - next_result < limit:
                entry = next(numbered, None)
                if entry is None:
                    exhausted = True
                    break
                connection = idle.pop()
                self._send(connection, entry)
                busy.add(connection)
                sent += 1
            if exhausted and not busy and not finished:
                return
            if next_result not in finished:
                for ready in wait(list(busy)):
                    assert isinstance(ready, Connection)
                    number, kind, value = self._receive(ready)
                    finished[number] = (kind, value)
                    busy.remove(ready)
                    idle.append(ready)
            while next_result in finished:
                yield _unwrap(*finished.pop(next_result))
                next_result += 1

    def _send(self, connection: Connection, entry: tuple[int, Any]) -> None:
        try:
            connection.send(entry)
        except OSError as error:
            raise self._death(connection) from error

    def _receive(self, connection: Connection) -> tuple[int, str, Any]:
        try:
            return connection.recv()
        except (EOFError, OSError) as error:
            raise self._death(connection) from error

    def _death(self, connection: Connection) -> WorkerError:
        process = self.processes[connection]
        process.join(_JOIN_SECONDS)
        code = process.exitcode
        if code is not None and code < 0:
            reason = f"was killed by {signal.Signals(-code).name}"
            fix = "If the machine ran out of memory, use fewer --workers"
        else:
            reason = f"ended with exit code {code}"
            fix = "Its own message stands above; with --workers 1 the failure shows in full"
        return WorkerError(f"{process.name} (process {process.pid}) {reason}. {fix}")

    def close(self) -> None:
        for connection, process in self.processes.items():
            connection.close()
            process.terminate()
        for process in self.processes.values():
            process.join(_JOIN_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _unwrap(kind: str, value: Any) -> Any:
    if kind == "result":
        return value
    if kind == "data error":
        raise value
    raise WorkerError(f"a worker failed:\n{value}")


def _work(
    function: Callable,
    connection: Connection,
    inherited: tuple[Connection, ...],
) -> None:
    # A collection here would walk all that a forked parent had, native libraries' objects among
    # it that are not made for that: it has ended in a segmentation fault. It would copy their pages
    # besides. Python's gc documentation recommends this for forked processes.
    gc.freeze()
    # Copies of the parent's ends would keep this worker alive after the parent's death.
    for other in inherited:
        other.close()
    # Ctrl-C reaches the whole group; the parent alone decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            number, item = connection.recv()
        except (EOFError, OSError):
            # The parent has ended. A socket that it left with an answer in it says "reset".
            return
        try:
            answer = (number, "result", function(item))
        except DataError as error:
            answer = (number, "data error", error)
        except Exception:
            answer = (number, "failure", traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return
