"""Ranks that die, hang or are stopped: every other one names the culprit and ends by itself."""

import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.training.checkpoint.saver import CheckpointSaver
from megatron_memory.training.ranks import watch
from megatron_memory.training.ranks.watch import EXIT_RANK_FAILED, RankWatch
from tests.distributed import _PRELOAD, _start
from tests.training.tiny_runs import change, run, tiny_config

SECONDS = 6.0


def _errors_to(folder: Path) -> None:
    file = os.open(folder / f"{os.environ['RANK']}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w")


def _fail(kind: str) -> None:
    if kind == "hangs":
        time.sleep(600)
    elif kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stops":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise ValueError("a bug of this rank alone")


def _play(folder: Path, kind: str, culprit: int) -> None:
    """Ranks that sum numbers, as a training does; the culprit fails after the third."""
    _errors_to(folder)
    with RankWatch(SECONDS, folder) as watch:
        for iteration in range(1000):
            watch.advance(iteration)
            if iteration == 3 and torch.distributed.get_rank() == culprit:
                _fail(kind)
            torch.distributed.all_reduce(torch.ones(1))
            time.sleep(0.01)


def _ends(function, folder: Path, world_size: int, stopped: int | None, *args) -> list:
    """Exit code of each rank (None for one that is stopped) and what it wrote to stderr."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    started = [
        _start(context, function, rank, world_size, str(folder), (folder, *args))
        for rank in range(world_size)
    ]
    ranks = [process for process, _ in started]
    try:
        deadline = time.monotonic() + 120
        for rank, process in enumerate(ranks):
            if rank != stopped:
                process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [(code, (folder / f"{rank}.err").read_text()) for rank, code in enumerate(codes)]


CASES = {
    "hangs": (1, r"hangs: no rank has made progress for \d+ s, .* in _fail\)"),
    "dies": (0, r"is dead: process \d+ has ended without a word"),
    "stops": (2, r"does not answer: nothing was heard of it for \d+ s"),
    "raises": (1, r"has ended: ValueError: a bug of this rank alone"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
@pytest.mark.parametrize("kind", CASES)
def test_survivors_name_the_rank_that_fails(kind: str, tmp_path: Path):
    culprit, reason = CASES[kind]
    began = time.monotonic()
    stopped = culprit if kind == "stops" else None
    ends = _ends(_play, tmp_path, 3, stopped, kind, culprit)
    assert time.monotonic() - began < 100
    for rank, (code, errors) in enumerate(ends):
        if rank == culprit and kind != "hangs":
            continue
        assert code == EXIT_RANK_FAILED == 4, errors
        (line,) = (line for line in errors.splitlines() if "RankError" in line)
        found = re.search(rf"^rank {rank}: RankError: rank {culprit} on \S+ {reason}", line)
        assert found, line
        folder = errors.partition("can be reached: ")[2].splitlines()[0]
        stacks = (Path(folder) / f"rank_{rank}.txt").read_text()
        assert "_play" in stacks and ("_fail" in stacks) == (rank == culprit)
    # A rank that hangs writes its stacks as well.
    assert len(list(tmp_path.glob("rank-failure-*/rank_*.txt"))) == (3 if kind == "hangs" else 2)


def _die_while_saving(folder: Path, config: Config) -> None:
    _errors_to(folder)
    write = CheckpointSaver._write

    def die(self, position, more):
        if position.iteration == 4 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, position, more)

    CheckpointSaver._write = die
    run(config)


@pytest.mark.skipif(sys.platform != "linux", reason="looks processes up in /proc")
def test_a_rank_that_dies_while_saving_is_no_error_of_the_disk(dataset: str, tmp_path: Path):
    save = tmp_path / "save"
    config = tiny_config(dataset, checkpoint={"save": str(save), "save_interval": 2})
    config = change(config, "parallel", rank_timeout=int(SECONDS))
    (code, errors), (died, _) = _ends(_die_while_saving, tmp_path, 2, None, config)
    assert (code, died) == (EXIT_RANK_FAILED, -signal.SIGKILL), errors
    assert "RankError: rank 1 on " in errors and "is dead" in errors
    assert "could not be written" not in errors and "space" not in errors
    assert list(save.glob("rank-failure-*/rank_0.txt"))


def test_who_is_watched_while_all_is_well_is_left_alone(dataset: str, tmp_path: Path):
    ends = _ends(_all_well, tmp_path, 2, None)
    assert [code for code, _ in ends] == [0, 0]
    assert all("RankError" not in errors for _, errors in ends)


def _all_well(folder: Path) -> None:
    """A checkpoint may take longer than a step, one that ends early waits at the end."""
    _errors_to(folder)
    with RankWatch(1.0, folder) as watch:
        torch.distributed.barrier()
        watch.advance(1)
        with watch.phase("saving"):
            time.sleep(3 if torch.distributed.get_rank() == 0 else 0)
            torch.distributed.barrier()
        torch.distributed.barrier()


@pytest.mark.parametrize("is_launchers", [True, False])
def test_who_has_the_store_is_to_blame_for_its_end(is_launchers: bool, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(is_launchers))
    error = torch.distributed.DistNetworkError("Broken pipe")
    (line,) = watch._without_store(error, "stacks").lines()
    who = "torchrun on the first node" if is_launchers else "rank 0 on an unknown host"
    assert line.startswith(f"RankError: {who} does not answer any more: the store ")
    assert "DistNetworkError: Broken pipe" in line
