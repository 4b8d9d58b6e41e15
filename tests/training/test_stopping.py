"""Signals and limits: how a training ends early, on all ranks alike."""

import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.data import loader
from megatron_memory.training import progress, step, trainer
from megatron_memory.training.checkpoint import folders, writer_queue
from megatron_memory.training.stopping import STOP_SIGNALS, SignalCatcher
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, tiny_config


def _signal_one_rank(config: Config, signum: int) -> tuple[int, list[int]]:
    # A shell that runs the tests in the background has SIGINT ignored, which is respected.
    signal.signal(signum, signal.SIG_DFL)

    def send(iteration, result):
        if iteration == 3 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signum)

    seen = run(config, send)
    return seen.exit_code, seen.iterations


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_signal_to_one_rank_saves_and_ends_all(name: str, dataset: str, tmp_path: Path):
    signum = signal.Signals[name]
    save = {"save": str(tmp_path / "save"), "async_save": name == "SIGUSR2"}
    config = tiny_config(dataset, checkpoint=save)
    results = run_ranks(_signal_one_rank, 2, config, int(signum))
    # The ranks agree once a step, before its update: what comes behind it counts in the next.
    assert results == [(128 + signum, [1, 2, 3, 4])] * 2
    assert folders.read_tracker(tmp_path / "save") == 4


@pytest.mark.parametrize("signum", STOP_SIGNALS)
def test_every_signal_is_remembered_and_those_to_ignore_are_not(signum: signal.Signals):
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    try:
        for handler in (signal.SIG_DFL, signal.SIG_IGN):
            signal.signal(signum, handler)
            catcher = SignalCatcher()
            catcher.install()
            signal.raise_signal(signum)
            ignored = handler == signal.SIG_IGN and signum in (signal.SIGINT, signal.SIGHUP)
            assert catcher.received == (0 if ignored else signum)
            if not ignored:
                # The second SIGINT ends the process at once.
                once = signum == signal.SIGINT
                assert (signal.getsignal(signum) == signal.SIG_DFL) == once
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_helpers_ignore_what_stops_a_training():
    assert set(writer_queue._JOB_SIGNALS) == set(STOP_SIGNALS)
    assert {*loader._JOB_SIGNALS, signal.SIGTERM} == set(STOP_SIGNALS)


def _evaluations(config: Config, signal_at_batch: int | None) -> tuple[int, list[str], int]:
    """Exit code, what was said of evaluations, and how many batches were evaluated; rank 1 gets a
    signal in the middle of a batch."""
    said: list[str] = []
    progress.Console.say = lambda self, line: said.append(line)
    original, batches = step._run_schedule, [0]

    def run_schedule(*args, forward_only):
        batches[0] += forward_only
        if forward_only and batches[0] == signal_at_batch and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, forward_only=forward_only)

    step._run_schedule = run_schedule
    try:
        exit_code = run(config).exit_code
    finally:
        step._run_schedule = original
    lines = [line.split(" (")[0] for line in said if "loss" in line and "perplexity" in line]
    return exit_code, lines, batches[0]


def _evaluation_stories(config: Config) -> list[tuple[int, list[str], int]]:
    whole = change(config, "checkpoint", save=None)
    again = change(config, "checkpoint", load=config.checkpoint.save)
    at_limit = change(again, "training", exit_interval=4)
    return [
        _evaluations(whole, None),
        # Three batches at iteration 0; the signal comes in the second one of iteration 2.
        _evaluations(config, 5),
        # Made up for, then stopped by a limit where the next one is due, which skips it.
        _evaluations(at_limit, None),
        # Made up for, and stopped in the last one, of the test data.
        _evaluations(again, 8),
        _evaluations(again, None),
    ]


def test_a_signal_ends_an_evaluation_which_the_next_run_makes_up_for(dataset: str, tmp_path: Path):
    config = tiny_config(dataset, checkpoint={"save": str(tmp_path / "save")})
    config = change(change(config, "data", split="60,20,20"), "training", train_iters=6)
    config = change(config, "training", eval_interval=2, eval_iters=3)
    first, second = run_ranks(_evaluation_stories, 2, config)
    assert first == second
    whole, cut, limited, cut_at_end, rest = first
    names = [line.split(" loss")[0] for line in whole[1]]
    assert names == [f"iteration {i}: validation" for i in (0, 2, 4, 6)] + ["iteration 6: test"]
    assert cut == (143, whole[1][:1], 5)
    assert limited == (0, whole[1][1:2], 3)
    assert cut_at_end == (143, whole[1][2:4], 8)
    assert rest == (0, whole[1][4:], 3)


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
    late = change(config, "checkpoint", save=None)
    late = change(late, "training", exit_interval=None, exit_duration_in_mins=1)
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
