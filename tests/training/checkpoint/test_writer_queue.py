"""The queue between a checkpoint's writers and the training process."""

import os
import queue
import signal
from multiprocessing.managers import SyncManager

import pytest

from megatron_memory.training.checkpoint.writer_queue import SealedQueue


class _TellsWhereItIsOpened:
    def __reduce__(self):
        return os.getpid, ()


def test_items_are_opened_by_the_reader_and_not_by_the_server():
    with SyncManager() as manager:
        opened_by_server = manager.Queue()
        opened_by_server.put(_TellsWhereItIsOpened())
        assert opened_by_server.get_nowait() != os.getpid()
        sealed = SealedQueue(manager.Queue)
        sealed.put(_TellsWhereItIsOpened())
        assert sealed.get_nowait() == os.getpid()
        with pytest.raises(queue.Empty):
            sealed.get_nowait()


def test_a_manager_that_is_killed_costs_one_item_and_no_error():
    managers = []

    def start():
        managers.append(SyncManager())
        managers[-1].start()
        return managers[-1].Queue()

    sealed = SealedQueue(start)
    sealed.put("lost")
    os.kill(managers[0]._process.pid, signal.SIGKILL)
    managers[0]._process.join()
    sealed.put("lost as well")
    with pytest.raises(queue.Empty):
        sealed.get_nowait()
    sealed.put("kept")
    assert sealed.get_nowait() == "kept" and len(managers) == 2
    managers[1].shutdown()
