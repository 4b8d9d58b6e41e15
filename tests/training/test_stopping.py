"""Signals, limits and numbers that are none: how a training ends early, on all ranks alike."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.exceptions import TrainingError
from megatron_memory.training import trainer
from megatron_memory.training.checkpoint import folders
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, tiny_config


def _signal_one_rank(config: Config, signum: int) -> tuple[int, list[int]]:
    def send(iteration, result):
        if iteration == 3 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signum)

    seen = run(config, send)
    return seen.exit_code, seen.iterations


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_signal_to_one_rank_saves_and_ends_all(name: str, dataset: str, tmp_path: Path):
    signum = signal.Signals[name]
    save = {"save": str(tmp_path / "save"), "async_save": name == "SIGUSR2"}
    config = tiny_config(dataset, checkpoint=save)
    results = run_ranks(_signal_one_rank, 2, config, int(signum))
    assert results == [(128 + signum, [1, 2, 3])] * 2
    assert folders.read_tracker(tmp_path / "save") == 3


def _signal_during_setup(config: Config) -> tuple[int, list[int]]:
    original = trainer.Trainer.run

    def run_after_signal(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    trainer.Trainer.run = run_after_signal
    seen = run(config)
    return seen.exit_code, seen.iterations


def test_signal_before_the_first_step_is_not_lost(dataset: str):
    assert run_ranks(_signal_during_setup, 1, tiny_config(dataset)) == [(143, [1])]


def _ending(config: Config) -> tuple[int, list[int]]:
    seen = run(config)
    return seen.exit_code, seen.iterations


def test_exit_interval_and_duration(dataset: str, tmp_path: Path):
    save = {"save": str(tmp_path / "save")}
    config = change(tiny_config(dataset, checkpoint=save), "training", exit_interval=4)
    assert run_ranks(_ending, 1, config) == [(0, [1, 2, 3, 4])]
    assert folders.read_tracker(tmp_path / "save") == 4
    load = change(config, "checkpoint", load=str(tmp_path / "save"))
    assert run_ranks(_ending, 1, load) == [(0, [5, 6, 7, 8])]
    late = change(config, "training", exit_interval=None, exit_duration_in_mins=1)
    assert run_ranks(_end_an_hour_later, 2, late) == [(0, [1])] * 2


def _end_an_hour_later(config: Config) -> tuple[int, list[int]]:
    from megatron_memory.training import stopping

    real, rank = stopping.time.monotonic, torch.distributed.get_rank()
    calls = [0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            calls[0] += 1
            return real() + (3600 if calls[0] > 1 and rank == 1 else 0)

    stopping.time = Clock
    return _ending(config)


def _not_a_number(config: Config, field: str) -> str:
    original, steps = trainer.train_step, [0]

    def train_step(*args):
        result = original(*args)
        steps[0] += 1
        if steps[0] == 2 and torch.distributed.get_rank() == 1:
            result = dataclasses.replace(result, **{field: float("nan")})
        return result

    trainer.train_step = train_step
    try:
        run(config)
    except TrainingError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("field", ["loss", "grad_norm", "value_grad_norm"])
def test_not_a_number_on_one_rank_stops_all_without_saving(
    field: str, dataset: str, tmp_path: Path
):
    config = tiny_config(dataset, checkpoint={"save": str(tmp_path / "save")})
    first, second = run_ranks(_not_a_number, 2, config, field)
    for message in (first, second):
        assert message.startswith("iteration 2: the loss is")
        assert "--lr" in message and "--load" in message
    assert "nan" in second
    assert folders.read_tracker(tmp_path / "save") is None
