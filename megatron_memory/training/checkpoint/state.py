"""What a checkpoint holds: megatron-core's sharded state dict, by Megatron's names.

| part | how it is stored |
|---|---|
| `model`, `optimizer` | whole tensors by name, each cut over the ranks: any layout can load them |
| `usage` | each memory layer's sums of read weights, cut likewise; not in every checkpoint |
| `rng_state` | one object a rank: for the same layout only |
| `opt_param_scheduler`, `position`, `layout`, `vocab_size` | plain values, written by rank 0 |
"""

import dataclasses
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_memory.config import Config
from megatron_memory.training.checkpoint import rng_state
from megatron_memory.training.setup import TrainingSetup, data_parallel_group
from megatron_memory.training.wrapping import unwrap

StateDict = dict[str, Any]

USAGE_SINCE = "usage_since_sample"
"""Sequences of the training data that were used before the slots' reads were counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """How far a training is."""

    iteration: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Sequences of the training data that they used."""


def sharded_model(model: list[torch.nn.Module]) -> StateDict:
    """The weights of this rank's chunks of the model."""
    names = ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]
    metadata = {"dp_cp_group": data_parallel_group()}
    return {
        name: unwrap(chunk).sharded_state_dict(metadata=metadata)
        for name, chunk in zip(names, model, strict=True)
    }


def is_extra_state(key: str) -> bool:
    """Whether a module's entry is what torch calls its extra state: of Transformer Engine, scales
    of fp8; of megatron-core's own layers, nothing."""
    return key.rpartition(".")[2].startswith("_extra_state")


def without_missing_extra_states(model: StateDict, objects: frozenset[str]) -> StateDict:
    """Ask only for those extra states that a checkpoint has.

    Those of other layers, and converted ones, have none; they are not weights.

    Args:
        model: what `sharded_model` made.
        objects: the checkpoint's names of what is no tensor.
    """
    return {
        name: {
            key: value
            for key, value in chunk.items()
            if not isinstance(value, ShardedObject)
            or value.unique_key in objects
            or not is_extra_state(key)
        }
        for name, chunk in model.items()
    }


def sharded_optimizer(setup: TrainingSetup, model: StateDict, *, is_loading: bool) -> StateDict:
    """The optimizer's state; `model` is what `sharded_model` made."""
    if is_loading and setup.config.optimizer.optimizer == "sgd":
        _let_momentum_load(setup)
    chunks = model["model"] if set(model) == {"model"} else model
    metadata = content_metadata(setup.config) | {"dp_cp_group": data_parallel_group()}
    return {
        "optimizer": setup.optimizer.sharded_state_dict(
            chunks, is_loading=is_loading, metadata=metadata
        )
    }


def sharded_usage(setup: TrainingSetup) -> StateDict:
    """How much each slot was read, and since when; {} where it is not counted. A collective
    call."""
    if not setup.usage.is_on:
        return {}
    return {"usage": setup.usage.sharded_totals(), USAGE_SINCE: setup.usage.first_sample}


def _let_momentum_load(setup: TrainingSetup) -> None:
    """megatron-core 0.16 knows how to make the state that is loaded into for Adam only."""
    for optimizer in setup.optimizer.chained_optimizers:
        optimizer.init_state_fn = _init_momentum


def _init_momentum(optimizer: torch.optim.SGD, config: object = None) -> None:
    """What the first step makes of zeros: SGD's own start."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def sharded_generators(setup: TrainingSetup) -> StateDict:
    """The state of this rank's random-number generators."""
    sizes, ranks = zip(
        (
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_rank(),
        ),
        (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        ),
        (data_parallel_group().size(), data_parallel_group().rank()),
        strict=True,
    )
    state = rng_state.capture(setup.backend.device)
    return {"rng_state": ShardedObject("rng_state", state, sizes, ranks)}


def content_metadata(config: Config) -> dict[str, Any]:
    """What a reader must know about the optimizer's part, in megatron-core's words."""
    metadata: dict[str, Any] = {"chained_optim_avoid_prefix": True}
    if config.parallel.use_distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
    return metadata


def layout(config: Config) -> dict[str, int]:
    """The parallel sizes, which generators' states depend on."""
    parallel = config.parallel
    return {
        "tensor": parallel.tensor_model_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "context": parallel.context_parallel_size,
        "expert": parallel.expert_model_parallel_size,
        "data": data_parallel_group().size(),
        "sequence_parallel": int(parallel.sequence_parallel),
    }


def expected_shapes(state: StateDict) -> dict[str, tuple[int, ...] | None]:
    """Global shape of every tensor that `state` asks for; None where any shape will do."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for value in nested_values(state):
        parts = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                shape = None if part.allow_shape_mismatch else tuple(part.global_shape)
                shapes[part.key] = shape
    return shapes
