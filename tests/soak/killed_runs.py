"""A training of two ranks under a launcher, each a process that can be killed."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from megatron_memory.config import Config
from megatron_memory.entry import run_entry
from megatron_memory.runtime import prepare_megatron, select_backend
from megatron_memory.training import program

NUM_RANKS = 2
SECONDS_TO_END = 60
"""That a rank may take to notice that another one is gone."""
_SECONDS_TO_MOVE = 300
"""Without which a run counts as one that hangs; a machine may be slowed by others."""


@dataclasses.dataclass
class Life:
    """One start of the training, up to its end."""

    launcher: psutil.Process
    ranks: list[psutil.Process]

    def is_running(self) -> bool:
        """Whether any rank is."""
        return any(map(_runs, self.ranks))

    def kill(self, *processes: psutil.Process) -> None:
        """SIGKILL, together with the writers that a killed rank has started."""
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def wait(self) -> None:
        """Until the launcher and every rank have ended."""
        _, alive = psutil.wait_procs([self.launcher, *self.ranks], timeout=SECONDS_TO_END)
        alive = [process for process in alive if _runs(process)]
        for process in alive:
            process.kill()
        assert not alive, f"{len(alive)} processes did not end within {SECONDS_TO_END} s"


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def start(config: Config, losses: Path) -> Life:
    """Start the program on two ranks, from the newest checkpoint of `--load`.

    Args:
        config: of the training.
        losses: file to which rank 0 adds a line for each step.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed_preload"])
    receiver, sender = context.Pipe(duplex=False)
    folder = tempfile.mkdtemp(dir=losses.parent)
    launcher = context.Process(target=_launch, args=(config, losses, folder, sender))
    launcher.start()
    sender.close()
    pids = receiver.recv()
    assert launcher.pid is not None
    return Life(psutil.Process(launcher.pid), [psutil.Process(pid) for pid in pids])


def _launch(config: Config, losses: Path, folder: str, sender) -> None:
    """What torchrun does: start the ranks, and wait for them."""
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(config, losses, folder, rank))
        for rank in range(NUM_RANKS)
    ]
    for rank in ranks:
        rank.start()
    sender.send([rank.pid for rank in ranks])
    sender.close()
    for rank in ranks:
        rank.join()


def _rank(config: Config, losses: Path, folder: str, rank: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(NUM_RANKS))
    torch.set_num_threads(1)
    with open(Path(folder) / f"rank{rank}.log", "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os._exit(run_entry(lambda: _train(config, losses, folder, rank)))


def _train(config: Config, losses: Path, folder: str, rank: int) -> int:
    prepare_megatron("cpu")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS
    )
    with open(losses, "a", encoding="utf-8") as file:

        def record(iteration: int, result) -> None:
            if rank == 0:
                file.write(json.dumps([iteration, result.loss]) + "\n")
                file.flush()

        return program.run_training(config, select_backend("cpu"), record)


def seen_losses(path: Path) -> list[tuple[int, float]]:
    """Iteration and loss of every step so far; a last line that a kill cut off is left out."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [tuple(json.loads(line)) for line in text.split("\n")[:-1]]


def wait_until(condition: Callable[[], bool], life: Life) -> bool:
    """Whether the condition came true before the life ended."""
    deadline = time.monotonic() + _SECONDS_TO_MOVE
    while not condition():
        if not life.is_running():
            return False
        if time.monotonic() > deadline:
            life.kill(life.launcher, *life.ranks)
            raise AssertionError(f"nothing happened for {_SECONDS_TO_MOVE} s")
        time.sleep(0.002)
    return True
