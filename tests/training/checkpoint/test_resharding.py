"""A training goes on under another layout with the states that it had, to the bit, and the same
losses."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_memory.config import Config, PrecisionConfig
from megatron_memory.memory import table
from megatron_memory.training import program
from megatron_memory.training.checkpoint import loader, state
from megatron_memory.training.setup import TrainingSetup
from tests.distributed import run_ranks
from tests.training.tiny_runs import Run, change, run, runs, tiny_config

Tensors = dict[str, torch.Tensor]
DISTOPT = {"use_distributed_optimizer": True}
OVERLAP = DISTOPT | {"overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2}
TP2_SP = TP2 | {"sequence_parallel": True}

PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
"""The second rank has both memory layers, and the first one no values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread."""

    ranks: int
    neighbours: int = 1
    """M."""
    chunk: int = 2**28
    """Elements of a table's chunk on a rank."""
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    replicates: bool = False
    """Whether pipeline ranks have a copy each of the table that they share."""


LAYOUTS = {
    "one": Layout(ranks=1),
    "dp2-m2": Layout(ranks=2, neighbours=2),
    "dp3-distopt": Layout(ranks=3, chunk=330, flags=DISTOPT),
    "dp4-overlap": Layout(ranks=4, chunk=900, flags=OVERLAP),
    "dp4-m2-overlap": Layout(ranks=4, neighbours=2, chunk=330, flags=OVERLAP),
    "tp2": Layout(ranks=2, flags=TP2),
    "tp2-sp-m2-distopt": Layout(ranks=4, neighbours=2, flags=TP2_SP | DISTOPT),
    "vpp2": Layout(ranks=2, chunk=330, flags=VPP2),
    "vpp2-dp2-overlap": Layout(ranks=4, flags=VPP2 | OVERLAP),
    "pp2-copies-m2-distopt": Layout(ranks=4, neighbours=2, flags=PP2 | DISTOPT, replicates=True),
}
MOVES: dict[str, tuple[str, ...]] = {
    "one-to-dp4-overlap": ("memory+", "bf16"),
    "dp4-overlap-to-tp2": ("peer", "bf16"),
    "tp2-to-vpp2-dp2-overlap": ("memory+",),
    "vpp2-dp2-overlap-to-vpp2": ("peer",),
    "vpp2-to-pp2-copies-m2-distopt": ("memory+", "bf16"),
    "pp2-copies-m2-distopt-to-dp3-distopt": ("memory+",),
    "dp3-distopt-to-tp2-sp-m2-distopt": ("memory+", "async"),
    "tp2-sp-m2-distopt-to-dp4-m2-overlap": ("memory+", "bf16"),
    "dp4-m2-overlap-to-one": ("memory+",),
    "tp2-to-dp2-m2": ("peer", "sgd", "bf16"),
}
"""Variant and settings. Each has another pair of layouts, optimizers, precisions and chunks."""


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint of the first iteration, and the next five without a move."""

    folder: str
    undisturbed: Run


def _config(dataset: str, variant: str, options: Sequence[str]) -> Config:
    # Far above the noise of sums in another order: see tests/training/test_parity_one_rank.py.
    optimizer = dict(lr=1e-2, lr_decay_iters=20, adam_eps=1e-4)
    return tiny_config(
        dataset,
        model={"num_layers": 4, "hidden_size": 64},
        memory=dict(layers="1,3", num_heads=2, top_k=4, num_half_keys=8, variant=variant)
        | ({} if variant == "peer" else {"value_dim": 160}),
        optimizer=optimizer | ({"optimizer": "sgd", "lr": 0.1} if "sgd" in options else {}),
        # Three microbatches for each of four ranks, four for each of three.
        training={"micro_batch_size": 1, "global_batch_size": 12},
        precision=PrecisionConfig(bf16="bf16" in options),
    )


def _under(config: Config, layout: Layout, *, stop: int, **checkpoint: Any) -> Config:
    config = change(config, "parallel", **layout.flags)
    config = change(
        config, "memory", parallel_size=layout.neighbours, replicate_pool=layout.replicates
    )
    config = change(config, "training", exit_interval=stop)
    return change(config, "checkpoint", **checkpoint)


def _run(config: Config, chunk: int) -> Run:
    table.MAX_CHUNK_ELEMENTS = chunk
    return run(config)


@dataclasses.dataclass
class Moved:
    """What a rank saw after the move."""

    run: Run
    kept: dict[str, bool]
    """Name of a saved tensor: whether this rank's parts of it were as saved, before the first
    step."""
    saved: set[str]
    """Names of what was saved."""


def _go_on(config: Config, chunk: int, folder: Path) -> Moved:
    load, kept = loader.load_checkpoint, {}
    saved = _tensors(folder)

    def load_and_compare(setup, found, notify):
        load(setup, found, notify)
        kept.update(_compared(setup, saved))

    program.load_checkpoint = load_and_compare
    return Moved(run=_run(config, chunk), kept=kept, saved=set(saved))


def _compared(setup: TrainingSetup, saved: Tensors) -> dict[str, bool]:
    model = state.sharded_model(setup.model)
    ours = model | state.sharded_optimizer(setup, model, is_loading=False)
    ours |= state.sharded_usage(setup)
    apply_factories(ours)
    kept: dict[str, bool] = {}
    for part in nested_values(ours):
        if isinstance(part, ShardedTensor):
            name = _saved_name(part.key, saved)
            same = torch.equal(part.data, saved[name][part.global_slice()])
            kept[name] = kept.get(name, True) and same
    return kept


def _saved_name(name: str, saved: Tensors) -> str:
    """Each of Megatron's optimizers has its own for main weights: `checkpoint.optimizer_kinds`."""
    for prefix in ("optimizer.state.param.", "optimizer.state.fp32_param."):
        if name.startswith(prefix) and name not in saved:
            weight = name.removeprefix(prefix)
            others = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")
            return next(other + weight for other in others if other + weight in saved)
    return name


def _tensors(folder: Path) -> Tensors:
    loaded = dist_checkpointing.load_plain_tensors(str(folder / "iter_0000003"))
    return {name: v for name, v in loaded.items() if isinstance(v, torch.Tensor)}


@pytest.fixture(scope="module")
def starts(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Start]:
    """Of one rank, made once for each variant and its options: the others start from it, for
    pipeline ranks would draw other initial weights."""

    @functools.cache
    def start(variant: str, options: tuple[str, ...]) -> Start:
        folder = str(tmp_path_factory.mktemp("start"))
        config, one = _config(dataset, variant, options), LAYOUTS["one"]
        first = _under(config, one, stop=1, save=folder)
        rest = _under(config, one, stop=6, load=folder)
        return Start(folder=folder, undisturbed=run_ranks(runs, 1, [first, rest])[0][1])

    return start


@pytest.mark.parametrize("move", MOVES)
def test_training_goes_on_elsewhere(move: str, dataset: str, starts, tmp_path: Path):
    """fp32: sums in another order, as in tests/training/test_memory_parallel.py. bf16: as there,
    too, where layouts drift apart by as much."""
    before, after = (LAYOUTS[name] for name in move.split("-to-"))
    variant, *options = MOVES[move]
    start = starts(variant, tuple({*options} - {"async"}))
    config = _config(dataset, variant, options)
    saved = tmp_path / "saved"
    saves = {"save": str(saved), "async_save": "async" in options}
    first = _under(config, before, stop=3, load=start.folder, **saves)
    run_ranks(_run, before.ranks, first, before.chunk)
    second = _under(config, after, stop=6, load=str(saved))
    tolerance = 2e-2 if "bf16" in options else 2e-5
    kept: dict[str, bool] = {}
    for seen in run_ranks(_go_on, after.ranks, second, after.chunk, saved):
        assert seen.run.iterations == [4, 5, 6]
        assert seen.run.losses == pytest.approx(start.undisturbed.losses[2:], abs=tolerance)
        assert seen.run.learning_rates == start.undisturbed.learning_rates[2:]
        kept |= {name: same and kept.get(name, True) for name, same in seen.kept.items()}
    assert all(kept.values()), [name for name, same in kept.items() if not same]
    needless = {name for name in seen.saved - set(kept) if "param." in name}
    assert seen.saved == set(kept) | needless
