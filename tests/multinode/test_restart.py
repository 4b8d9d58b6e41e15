"""Processes and a whole host fail in mid-run; the run goes on as if nothing had happened."""

import os
import signal
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_memory.config import parse_arguments
from tests.distributed import run_ranks
from tests.multinode.hosts import Host
from tests.multinode.training import Node, losses, tiny_flags
from tests.training.tiny_runs import run

pytestmark = [pytest.mark.multinode, pytest.mark.distributed, pytest.mark.slow]

ITERATIONS, SAVE_INTERVAL = 24, 4
SECONDS = 300
"""For a start with all its imports, on two busy cores."""


def _flags(dataset: str, save: Path) -> list[str]:
    """Tensor parallelism within the hosts, data parallelism and the table's columns across."""
    return tiny_flags(
        dataset,
        train_iters=ITERATIONS,
        save_interval=SAVE_INTERVAL,
        save=save,
        load=save,
        tensor_model_parallel_size=2,
        memory_parallel_size=2,
        memory_value_dim=128,
        use_distributed_optimizer="",
    )


def _undisturbed(flags: list[str]) -> list[float]:
    return run(parse_arguments(flags)).losses


def _tensors(folders: list[Path]) -> list[dict[str, torch.Tensor]]:
    loaded = [dist_checkpointing.load_plain_tensors(str(folder)) for folder in folders]
    return [{k: v for k, v in d.items() if isinstance(v, torch.Tensor)} for d in loaded]


def _has_reached(iteration: int, since_start: int):
    """Whether the log reports an iteration after so many restarts."""

    def seen(log: str) -> bool:
        parts = log.split("no checkpoint in ")[-1].split("loaded ")
        return len(parts) > since_start and any(
            number >= iteration for number, _ in losses(parts[since_start])
        )

    return seen


def test_run_survives_a_killed_process_and_a_killed_host(
    hosts: tuple[Host, Host], dataset: str, tmp_path: Path
):
    """Exactly the undisturbed run's losses and last checkpoint: the layout is the same, and the
    hosts keep their ranks because torchrun sorts them by address."""
    save = tmp_path / "save"
    flags = _flags(dataset, save)
    first, second = nodes = [Node(hosts, rank, tmp_path) for rank in (0, 1)]
    try:
        for node in nodes:
            node.start(flags, PROCESSES="2")
        first.wait_for(_has_reached(SAVE_INTERVAL + 2, 0), SECONDS)
        workers = second.program.children_of("torchrun")
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        first.wait_for(_has_reached(2 * SAVE_INTERVAL + 2, 1), SECONDS)
        second.program.power_off()
        second.start(flags, PROCESSES="2")
        assert first.program.wait(SECONDS) == 0, first.log
        assert second.program.wait(SECONDS) == 0, second.log
    finally:
        for node in nodes:
            node.program.power_off()
    assert first.log.count("loaded ") == 2, first.log
    seen = losses(first.log)
    # Iterations after the newest checkpoint are computed again.
    assert len(seen) > ITERATIONS and {i for i, _ in seen} == set(range(1, ITERATIONS + 1))
    expected = run_ranks(_undisturbed, 4, _flags(dataset, tmp_path / "undisturbed"))[0]
    assert [loss for _, loss in seen] == [f"{expected[i - 1]:.6f}" for i, _ in seen]
    last = f"iter_{ITERATIONS:07d}"
    ours, reference = run_ranks(_tensors, 1, [save / last, tmp_path / "undisturbed" / last])[0]
    assert ours.keys() == reference.keys() and len(ours) > 20
    for name, tensor in reference.items():
        assert torch.equal(ours[name], tensor), name
