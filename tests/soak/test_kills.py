"""SIGKILL at random moments: no finished checkpoint is lost, and what goes on is the same run."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.finding import find_checkpoint
from tests.distributed import run_ranks
from tests.soak.killed_runs import Life, seen_losses, start, wait_until
from tests.soak.rounds import rounds
from tests.training.tiny_runs import VOCAB, change, runs, tiny_config

KILLS = rounds(100)
ITERATIONS = 12 * KILLS
INTERVAL = 5


def _kill_one_rank(life: Life, choose: random.Random) -> None:
    life.kill(choose.choice(life.ranks))


def _kill_all(life: Life, choose: random.Random) -> None:
    life.kill(life.launcher, *life.ranks)


def _kill_launcher(life: Life, choose: random.Random) -> None:
    """Its ranks live on, until somebody ends them, too."""
    life.kill(life.launcher)
    time.sleep(choose.uniform(0, 0.3))
    life.kill(*life.ranks)


TARGETS: tuple[Callable[[Life, random.Random], None], ...] = (
    _kill_one_rank,
    _kill_all,
    _kill_launcher,
)


def _config(dataset: str, save: Path, *, async_save: bool) -> Config:
    config = tiny_config(
        dataset,
        model={"attention_dropout": 0.1, "hidden_dropout": 0.1},
        checkpoint={
            "save": str(save),
            "load": str(save),
            "save_interval": INTERVAL,
            "keep_last": 2,
            "async_save": async_save,
        },
    )
    return change(config, "training", train_iters=ITERATIONS)


def _await_moment(life: Life, save: Path, losses: Path, choose: random.Random) -> bool:
    """After one to ten steps; every other time while a checkpoint is being written."""
    enough = len(seen_losses(losses)) + choose.randint(1, 2 * INTERVAL)
    if not wait_until(lambda: len(seen_losses(losses)) >= enough, life):
        return False
    if choose.random() < 0.5:
        wait_until(lambda: any(save.glob("iter_*.incomplete*")), life)
        time.sleep(choose.uniform(0, 0.03))
    else:
        time.sleep(choose.uniform(0, 0.05))
    return life.is_running()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_nothing_is_lost(mode: str, dataset: str, tmp_path: Path):
    save, losses = tmp_path / "save", tmp_path / "losses.jsonl"
    config = _config(dataset, save, async_save=mode == "async")
    choose, newest, kills, resumed = random.Random(mode), 0, 0, 0
    while kills < KILLS // 2:
        life = start(config, losses)
        resumed += newest > 0
        if kills and not newest:
            # One kill before there is a checkpoint is enough; on a slow machine all would be.
            wait_until(lambda: folders.read_tracker(save) is not None, life)
        if _await_moment(life, save, losses, choose):
            newest = max(newest, folders.read_tracker(save) or 0)
            choose.choice(TARGETS)(life, choose)
            kills += 1
        life.wait()
        newest = _newest_whole(config, newest)
        assert newest < ITERATIONS, "the training ended before it was killed often enough"
    start(config, losses).wait(seconds=1800)
    assert _newest_whole(config, newest) == ITERATIONS
    print(f"{kills} kills, {len(seen_losses(losses)) - ITERATIONS} steps were taken again")
    assert resumed > kills // 2, "hardly any start had a checkpoint to go on from"
    _assert_same_run(config, losses)


def _newest_whole(config: Config, at_least: int) -> int:
    """Iteration of the newest checkpoint, which must be whole and no older than was seen."""
    found = find_checkpoint(Path(config.checkpoint.save), config, VOCAB)
    iteration = 0 if found is None else found.common["iteration"]
    assert iteration >= at_least, f"iteration {at_least} was complete, and is lost"
    return iteration


def _assert_same_run(config: Config, losses: Path) -> None:
    """Every step, also those that were taken twice, gave the loss of a run that nobody killed."""
    torch.set_num_threads(1)
    nothing = {"save": None, "load": None, "save_interval": None, "keep_last": None}
    undisturbed = change(config, "checkpoint", **nothing, async_save=False)
    expected = run_ranks(runs, 2, [undisturbed], timeout=1800)[0][0].losses
    seen = seen_losses(losses)
    assert {iteration for iteration, _ in seen} == set(range(1, ITERATIONS + 1))
    for iteration, loss in seen:
        assert loss == expected[iteration - 1], f"iteration {iteration}"
