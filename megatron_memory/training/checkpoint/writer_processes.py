"""The processes of a rank that write its tensors, and what becomes of a save where one is ended.

megatron-core 0.16 waits for a word of each of them, forever where the kernel has ended one for lack
of memory. Here the end of a process ends its pipe, which is an error of that save alone.
"""

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

LeaveSums = Callable[[Path], None]


def write_in_processes(
    transforms: list[Any],
    use_msc: bool,
    rank: int,
    write_buckets: list[tuple[Any, ...]],
    results: Any,
    leave_sums: LeaveSums | None = None,
) -> None:
    """What megatron-core's `write_preloaded_data_multiproc` does: a process for each bucket.

    Args:
        transforms: of what is written.
        use_msc: multi-storage-client, which is not used here.
        rank: of this process.
        write_buckets: a file's path, its name, and what it holds; each.
        results: queue that gets a list of results by the bucket's number, or an exception.
        leave_sums: called with the path of each file, in its process, while the disk takes it.
    """
    assert not use_msc, f"rank {rank}: checkpoints are written to files"
    # What collecting garbage would free belongs to the training process, which forked this one.
    with _no_collection():
        running = [
            _start(number, bucket, transforms, leave_sums)
            for number, bucket in enumerate(write_buckets)
        ]
        ends = [_end_of(*started) for started in running]
    failed = next((end for end in ends if isinstance(end, Exception)), None)
    results.put(dict(enumerate(ends)) if failed is None else failed)


def _start(
    number: int, bucket: tuple[Any, ...], transforms: list[Any], leave_sums: LeaveSums | None
) -> tuple[BaseProcess, Connection, str]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=partial(_write, number, bucket, transforms, leave_sums, sender)
    )
    process.start()
    # The process has the only other end, so that its own end is seen here.
    sender.close()
    return process, receiver, str(bucket[0])


def _write(
    number: int,
    bucket: tuple[Any, ...],
    transforms: list[Any],
    leave_sums: LeaveSums | None,
    sender: Connection,
) -> None:
    result = _Result()
    FileSystemWriterAsync.write_preloaded_data(
        transforms,
        local_proc_idx=number,
        write_bucket=bucket,
        results_queue=result,
        count_queue=_Uncounted(),
        use_fsync=False,
    )
    if not isinstance(result.outcome, Exception):
        try:
            _finish(Path(bucket[0]), leave_sums)
        except OSError as error:
            result.outcome = error
    sender.send(result.outcome)


def _finish(path: Path, leave_sums: LeaveSums | None) -> None:
    """Have the disk take a file. While it does, the processor is free to sum what memory holds."""
    summing = None if leave_sums is None else threading.Thread(target=leave_sums, args=[path])
    if summing is not None:
        summing.start()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    if summing is not None:
        summing.join()


def _end_of(process: BaseProcess, receiver: Connection, path: str) -> list[Any] | Exception:
    """The results of a process, or why there are none."""
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    receiver.close()
    if outcome is None:
        how = f"by signal {-process.exitcode}" if process.exitcode else "without a word"
        return OSError(f"the process that writes {path} was ended {how}")
    return outcome


@contextmanager
def _no_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Result:
    """The queue that a process says its result to."""

    def __init__(self) -> None:
        self.outcome: Any = None

    def put(self, item: tuple[int, Any]) -> None:
        _, self.outcome = item


class _Uncounted:
    """In place of megatron-core's queue that counts the processes at work."""

    def get(self) -> None:
        pass

    def task_done(self) -> None:
        pass
