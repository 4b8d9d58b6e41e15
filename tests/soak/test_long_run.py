"""10,000 steps of a small run: memory, threads, file handles and step time stay where they were."""

import dataclasses
import gc
import statistics
import time
from pathlib import Path

import psutil

from megatron_memory.config import Config
from megatron_memory.runtime import select_backend
from megatron_memory.training import program
from tests.distributed import run_ranks
from tests.soak.rounds import rounds
from tests.training.tiny_runs import tiny_config

STEPS = rounds(10_000)
WINDOWS = 10


@dataclasses.dataclass(frozen=True)
class Window:
    """A tenth of the run."""

    memory: int
    """Bytes that this process has in memory at the end."""
    threads: int
    """Of this process at the end."""
    handles: int
    """Open files of this process at the end."""
    step: float
    """Median seconds from step to step, saves and evaluations left out."""


def _watched(config: Config) -> list[Window]:
    process, windows, times = psutil.Process(), [], [time.perf_counter()]

    def look(iteration: int, result: object) -> None:
        times.append(time.perf_counter())
        if iteration % (STEPS // WINDOWS) == 0:
            gc.collect()
            steps = [after - before for before, after in zip(times, times[1:], strict=False)]
            info = process.memory_info()
            windows.append(
                Window(
                    info.rss - info.shared,
                    process.num_threads(),
                    process.num_fds(),
                    statistics.median(steps),
                )
            )
            times[:] = [time.perf_counter()]

    # Not by `tiny_runs.run`, which keeps every step's result.
    program.run_training(config, select_backend("cpu"), look)
    return windows


def test_nothing_grows(dataset: str, tmp_path: Path):
    save = {"save": str(tmp_path / "save"), "save_interval": STEPS // 20, "keep_last": 2}
    training = {"micro_batch_size": 2, "global_batch_size": 2, "train_iters": STEPS}
    config = tiny_config(
        dataset,
        checkpoint=save | {"async_save": True},
        training=training | {"eval_interval": STEPS // 10, "eval_iters": 2},
        logging={"log_interval": 20, "tensorboard_dir": str(tmp_path / "curves")},
    )
    (windows,) = run_ranks(_watched, 1, config, timeout=1800)
    for number, window in enumerate(windows):
        print(f"steps to {(number + 1) * STEPS // WINDOWS}: {window}")
    # Caches and the allocator settle in the first windows.
    settled, last = windows[3:6], windows[7:]
    grown = min(w.memory for w in last) - max(w.memory for w in settled)
    assert grown < 2**18 + STEPS * 10, f"{grown / STEPS:.0f} bytes a step stay"
    assert max(w.threads for w in last) <= max(w.threads for w in settled)
    assert max(w.handles for w in last) <= max(w.handles for w in settled)
    # The machine may be slowed by others for a while, but not in each of three windows.
    assert min(w.step for w in last) < 1.5 * min(w.step for w in windows)
