"""The process through which checkpoint writers hand their results to the training process.

megatron-core starts it on the first save. Here it is started before the training, so that it does
not inherit what the training process does with signals, and with two manners of its own: it ignores
the signals that stop a training (Slurm sends them to every process of a job, and without it the
last save would fail), and it ends when the training process dies. What passes through it stays
pickled: to open it the process would import torch, two seconds of each rank's first save.

This module is imported by that process: it must stay light.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from queue import Empty, Queue
from typing import Any

_MANAGER_IS_GONE = (OSError, EOFError)
_JOB_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
"""`stopping.STOP_SIGNALS`, whose module is too heavy for this process."""


class SealedQueue:
    """A manager's queue whose items the manager does not open; what megatron-core uses of one.

    Where the manager has been killed the items are lost, which is an error of one save alone: the
    next has a new manager.

    Args:
        start: starts a manager, and returns a queue of it.
    """

    def __init__(self, start: "Callable[[], Queue[bytes]]"):
        self._start = start
        self._queue = start()

    def put(self, item: Any) -> None:
        """Add an item; it must be picklable."""
        # That it is missing is noticed by `get_nowait`.
        with contextlib.suppress(*_MANAGER_IS_GONE):
            self._queue.put(pickle.dumps(item))

    def get_nowait(self) -> Any:
        """The oldest item.

        Raises:
            queue.Empty: there is none.
        """
        try:
            sealed = self._queue.get_nowait()
        except _MANAGER_IS_GONE as error:
            self._queue = self._start()
            raise Empty from error
        # What this run's own writers put in: no file, and nobody else, reaches this queue.
        return pickle.loads(sealed)  # nosec B301


def start_writer_queue() -> None:
    """Give megatron-core's checkpoint writer its queue. Call once a process, before training."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is not None:
        return
    filesystem_async._results_queue = SealedQueue(_queue_of_a_new_manager)


def _queue_of_a_new_manager() -> "Queue[bytes]":
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(initializer=_become_server)
    return manager.Queue()


def _become_server() -> None:
    for signum in _JOB_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "the server of the writers' queue runs in a process of its own"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(0)
