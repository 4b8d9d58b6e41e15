"""Run a function on several ranks, each a process of its own with a gloo process group."""

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from megatron_memory.runtime import prepare_megatron

_PRELOAD = ["tests.distributed_preload"]


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180.0
) -> list[Any]:
    """Call function(*args) on each rank and return what the ranks return, in rank order.

    The processes are forked from a server that has imported megatron-core once. The function must
    be importable, at a module's top level.

    Raises:
        AssertionError: a rank failed (with its traceback) or did not finish in time (seconds).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _start(context, function, rank, world_size, folder, args) for rank in range(world_size)
        ]
        try:
            return _collect([connection for _, connection in ranks], timeout)
        finally:
            for process, _ in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _start(context, function, rank: int, world_size: int, folder: str, args: tuple):
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_rank_main, args=(function, rank, world_size, folder, sender, args), daemon=False
    )
    process.start()
    sender.close()
    return process, receiver


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(connections):
        waiting = [c for i, c in enumerate(connections) if i not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(connections))) - set(results))} did not finish"
        for connection in ready:
            rank = connections.index(connection)
            results[rank] = _receive(rank, connection)
    return [results[rank] for rank in range(len(connections))]


def _receive(rank: int, connection: Connection) -> Any:
    try:
        succeeded, payload = connection.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died without a word") from None
    assert succeeded, f"rank {rank} failed:\n{payload}"
    return torch.load(io.BytesIO(payload), weights_only=False)


def _rank_main(function, rank, world_size, folder, connection: Connection, args) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        prepare_megatron("cpu")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        payload = io.BytesIO()
        torch.save(function(*args), payload)
        connection.send((True, payload.getvalue()))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
