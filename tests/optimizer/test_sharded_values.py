"""Every rank saves its own shard of the values' states: together they are the tables' states, in
the tensors that megatron-core's own format has."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_memory.config import PrecisionConfig
from megatron_memory.memory import table
from megatron_memory.optimizer import MemoryOptimizer
from megatron_memory.optimizer.sharded_values import rectangles
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training import wrapping
from megatron_memory.training.checkpoint import state
from megatron_memory.training.setup import TrainingSetup, build_training_setup
from tests.distributed import run_ranks
from tests.tiny import VOCAB, tiny_config

ROWS, COLUMNS, ONE_CHUNK = 64, 40, 2**28


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_rectangles_are_the_range(columns: int):
    block = torch.arange(6 * columns)
    for first in range(len(block) + 1):
        for last in range(first, len(block) + 1):
            boxes = list(rectangles(first, last, columns=columns))
            assert len(boxes) <= 3
            covered = [i for box in boxes for i in range(box.first, box.last)]
            assert covered == list(range(first, last))
            for box in boxes:
                (row, column), (rows, width) = box.offset, box.shape
                part = block.view(-1, columns)[row : row + rows, column : column + width]
                assert torch.equal(part, block[box.first : box.last].view(box.shape))


LAYOUTS: dict[str, tuple[int, str, int, dict[str, Any]]] = {
    "three-ranks": (3, "memory+", ONE_CHUNK, {}),
    "peer-tp2": (4, "peer", 330, {"tensor": 2, "buckets": True}),
    "neighbours": (4, "memory+", 330, {"neighbours": 2, "buckets": True}),
    "layers": (3, "memory+", 900, {"share_scope": "layer", "bf16": True}),
}
"""Ranks, variant, elements of a chunk, and more. Neither 330 elements nor a rank's share of all
64 * 40 are whole rows, but where two or four ranks share them."""


def _setup(variant: str, elements: int, options: dict[str, Any]) -> TrainingSetup:
    buckets = options.get("buckets", False)
    config = tiny_config(
        variant,
        parallel={
            "tensor_model_parallel_size": options.get("tensor", 1),
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": buckets,
            "overlap_param_gather": buckets,
        },
        memory={
            "value_dim": COLUMNS,
            "parallel_size": options.get("neighbours", 1),
            "share_scope": options.get("share_scope", "model"),
        },
        precision=PrecisionConfig(bf16=options.get("bf16", False)),
    )
    backend = select_backend("cpu")
    if not parallel_state.model_parallel_is_initialized():
        initialize_distributed(config, backend)
    table.MAX_CHUNK_ELEMENTS = elements
    if buckets:  # one for each parameter, with a padding of its own
        wrapping.DistributedDataParallelConfig = functools.partial(
            wrapping.DistributedDataParallelConfig, bucket_size=1
        )
    return build_training_setup(config, backend, padded_vocab_size=VOCAB)


def _sharded(setup: TrainingSetup, *, is_loading: bool) -> dict[str, Any]:
    model = state.sharded_model(setup.model)
    return state.sharded_optimizer(setup, model, is_loading=is_loading)


Part = tuple[str, tuple[int, int], tuple[int, int], int, dict[str, Tensor]]
"""Of a table, by name: where a chunk begins in it and its shape, where a rank's flat shard begins
in the chunk, and the shard's states."""


def _shards(setup: TrainingSetup) -> list[Part]:
    """By megatron-core's own book-keeping, not by what is tested."""
    values = setup.optimizer.chained_optimizers[1]
    parts = []
    for sharded in state.sharded_model(setup.model)["model"].values():
        chunk = getattr(sharded, "data", None)
        if chunk in values.model_param_gbuf_map:
            first = values._get_model_param_range_map(chunk)["param"].start
            states = values._get_main_param_and_optimizer_states(chunk)
            states = {name: values.clone() for name, values in states.items()}
            parts.append((sharded.key, sharded.global_offset, tuple(chunk.shape), first, states))
    return parts


def _dense_states(setup: TrainingSetup) -> list[Tensor]:
    """Of everything but the values: main weights and moments of this rank."""
    states = setup.optimizer.chained_optimizers[0].optimizer.state
    return [tensor.clone() for shard in states for tensor in (shard, *states[shard].values())]


def _fill(setup: TrainingSetup) -> None:
    """Other numbers in every state of every rank; tensor-parallel ranks share some dense ones."""
    _sharded(setup, is_loading=True)
    ranks = (parallel_state.get_data_parallel_rank(), torch.distributed.get_rank())
    for optimizer, rank in zip(setup.optimizer.chained_optimizers, ranks, strict=True):
        generator = torch.Generator().manual_seed(rank)
        for group in optimizer.optimizer.param_groups:
            group["step"] = 1
        for shard, states in optimizer.optimizer.state.items():
            for tensor in (shard, *states.values()):
                tensor.data.normal_(generator=generator)


@dataclasses.dataclass
class Seen:
    """What one rank saw; by format: `ours` or `megatron`."""

    shards: list[Part]
    tables: dict[str, dict[str, Tensor]]
    """Read from the checkpoint whole."""
    loaded: dict[str, list[Part]]
    """Read by the optimizer of another set-up."""
    dense_is_kept: dict[str, bool]
    """Whether that one's other states are those that were saved."""


def _save_and_load(
    folder: Path, variant: str, elements: int, options: dict[str, Any], formats: list[str]
) -> Seen:
    setup = _setup(variant, elements, options)
    _fill(setup)
    seen = Seen(shards=_shards(setup), tables={}, loaded={}, dense_is_kept={})
    for name in formats:
        (folder / name).mkdir(exist_ok=True)
        saver = ChainedOptimizer if name == "megatron" else MemoryOptimizer
        setup.optimizer.sharded_state_dict = functools.partial(
            saver.sharded_state_dict, setup.optimizer
        )
        dist_checkpointing.save(_sharded(setup, is_loading=False), str(folder / name))
        seen.tables[name] = _saved_tables(folder / name)
        other = _setup(variant, elements, options)
        wanted = _sharded(other, is_loading=True)
        loaded = dist_checkpointing.load(wanted, str(folder / name))
        other.optimizer.load_state_dict(loaded["optimizer"])
        seen.loaded[name] = _shards(other)
        pairs = zip(_dense_states(setup), _dense_states(other), strict=True)
        seen.dense_is_kept[name] = all(torch.equal(saved, read) for saved, read in pairs)
    return seen


def _saved_tables(folder: Path) -> dict[str, Tensor]:
    tensors = dist_checkpointing.load_plain_tensors(str(folder))
    return {name: tensor for name, tensor in tensors.items() if ".memory." in name}


def _assembled(parts: list[Part]) -> dict[str, Tensor]:
    tables: dict[str, Tensor] = {}
    for key, (row, column), (rows, columns), first, states in parts:
        for name, shard in states.items():
            whole = tables.setdefault(
                f"optimizer.state.{name}.{key}", torch.full((ROWS, COLUMNS), torch.nan)
            )
            chunk = torch.full((rows * columns,), torch.nan)
            chunk[first : first + len(shard)] = shard
            target = whole[row : row + rows, column : column + columns]
            target.copy_(torch.where(chunk.isnan(), target.flatten(), chunk).view(rows, columns))
    for name, whole in tables.items():
        assert not whole.isnan().any(), name
    return tables


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_shards_are_the_tables_states(layout: str, tmp_path: Path):
    """And megatron-core's own format, which gathers them, has the same: each reads the other's.

    The other states are megatron-core's to save, and right, too (`runtime.megatron_repairs`).
    """
    world_size, variant, elements, options = LAYOUTS[layout]
    formats = ["ours", "megatron"]
    ranks = run_ranks(_save_and_load, world_size, tmp_path, variant, elements, options, formats)
    expected = _assembled([part for seen in ranks for part in seen.shards])
    for seen in ranks:
        for name in formats:
            assert seen.dense_is_kept[name]
            _assert_same(seen.tables[name], expected)
            assert len(seen.shards) == len(seen.loaded[name])
            for (*_, states), (*_, loaded) in zip(seen.shards, seen.loaded[name], strict=True):
                _assert_same(loaded, states)


def _assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name
