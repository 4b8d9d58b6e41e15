"""A checkpoint holds one tensor [S, D] for a table, and for each of its optimizer states, whatever
chunks of rows the run had: a later run may have others."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_memory.config import Config, PrecisionConfig
from megatron_memory.memory import table
from tests.distributed import run_ranks
from tests.training.tiny_runs import Run, change, run, tiny_config

ONE_CHUNK = 2**28
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "fp32": (1, {}, False, (200, ONE_CHUNK)),
    "bf16": (1, {}, True, (ONE_CHUNK, 200)),
    "tp2-bf16": (2, {"tensor_model_parallel_size": 2}, True, (200, 330)),
    "distopt-bf16": (2, {"use_distributed_optimizer": True}, True, (200, 330)),
    "distopt-overlap": (2, {"use_distributed_optimizer": True} | OVERLAP, False, (ONE_CHUNK, 330)),
}
"""Ranks, flags, whether in bf16, and the elements of a chunk before and after."""
USAGE = "memory_usage."
TABLE = "memory.shared.values.weight"


def _runs_in_chunks(configs: list[tuple[Config, int]]) -> list[Run]:
    results = []
    for config, elements in configs:
        table.MAX_CHUNK_ELEMENTS = elements
        results.append(run(config))
    return results


def _configs(dataset: str, folder: Path, layout: str) -> tuple[Config, Config, Config]:
    """Four iterations; two; the other two. Each saves where it ends."""
    _, parallel, bf16, _ = LAYOUTS[layout]
    precision = PrecisionConfig(bf16=bf16)
    plain = tiny_config(dataset, parallel=parallel | {"device": "cpu"}, precision=precision)

    def stop(iterations: int, **checkpoint: str | None) -> Config:
        stopped = change(plain, "training", exit_interval=iterations)
        return change(stopped, "checkpoint", **checkpoint)

    half = str(folder / "half")
    return (
        stop(4, save=str(folder / "whole")),
        stop(2, save=half),
        stop(4, load=half, save=str(folder / "rest")),
    )


def _tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    loaded = dist_checkpointing.load_plain_tensors(str(folder / f"iter_{iteration:07d}"))
    return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}


def _assert_same_tensors(folder: Path) -> dict[str, torch.Tensor]:
    whole, rest = (_tensors(folder / name, 4) for name in ("whole", "rest"))
    assert whole.keys() == rest.keys()
    for name, tensor in whole.items():
        if name.startswith(USAGE):
            # Sums of fp32 in other groups: up to a stop, and from there.
            assert torch.allclose(tensor, rest[name], rtol=1e-5), name
        else:
            assert torch.equal(tensor, rest[name]), name
    return whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_may_change_between_runs(layout: str, dataset: str, tmp_path: Path):
    """The rows' states follow them to the bit: weights, main weights and both moments."""
    world_size, _, bf16, (before, after) = LAYOUTS[layout]
    whole, half, rest = _configs(dataset, tmp_path, layout)
    chunked = [(whole, ONE_CHUNK), (half, before), (rest, after)]
    for one, first, second in run_ranks(_runs_in_chunks, world_size, chunked):
        assert first.losses + second.losses == one.losses
    saved = run_ranks(_assert_same_tensors, 1, tmp_path)[0]
    tables = {name: tensor for name, tensor in saved.items() if name.endswith(TABLE)}
    names = {TABLE, *(f"optimizer.state.{state}.{TABLE}" for state in ("exp_avg", "exp_avg_sq"))}
    assert names <= set(tables)
    assert len(tables) == (4 if bf16 or "distopt" in layout else 3), list(tables)
    for name, tensor in tables.items():
        assert tensor.shape == (64, 32), name
        assert tensor.any(), name
