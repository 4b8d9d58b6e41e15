"""Whole tensors in and out of a model that is split over ranks, by their names in a checkpoint."""

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
)
from torch import Tensor

from megatron_memory.exceptions import CheckpointError
from megatron_memory.model.gpt import MemoryGPTModel


def load_full_weights(model: MemoryGPTModel, tensors: dict[str, Tensor]) -> None:
    """Set every weight of this rank from whole tensors, named as in a Megatron checkpoint.

    Args:
        model: unwrapped and whole, without pipelining; keeps its dtypes and devices.
        tensors: name to whole tensor, as one rank alone would hold it.

    Raises:
        CheckpointError: a name is missing or unknown, or a shape differs.
    """
    unknown = sorted(set(tensors) - load_stage_weights(model, tensors))
    if unknown:
        raise CheckpointError(f"weights that the model does not have: {', '.join(unknown)}")


@torch.no_grad()
def load_stage_weights(chunk: MemoryGPTModel, tensors: dict[str, Tensor]) -> set[str]:
    """Set every weight of a model's chunk, as `load_full_weights` does of a whole one.

    Returns:
        the names that the chunk has.

    Raises:
        CheckpointError: a name is missing, or a shape differs.
    """
    sharded = _weight_shards(chunk)
    factories = {k: v for k, v in sharded.items() if isinstance(v, ShardedTensorFactory)}
    apply_factories(sharded)
    state: dict = {}
    used: set[str] = set()
    for name, shards in sharded.items():
        state[name] = _map(shards, lambda shard: _cut(shard, tensors))
        used.update(shard.key for shard in _flatten(shards))
    apply_factory_merges(state, factories)
    chunk.load_state_dict(state, strict=False)
    return used


def _weight_shards(model: MemoryGPTModel) -> dict:
    """The model's sharded tensors; extra states of Transformer Engine have none."""
    kept = (ShardedTensor, ShardedTensorFactory)
    return {k: v for k, v in model.sharded_state_dict().items() if isinstance(v, kept)}


def _flatten(shards) -> list[ShardedTensor]:
    if isinstance(shards, ShardedTensor):
        return [shards]
    items = shards.values() if isinstance(shards, dict) else shards
    return [shard for item in items for shard in _flatten(item)]


def _map(shards, function):
    if isinstance(shards, ShardedTensor):
        return function(shards)
    if isinstance(shards, dict):
        return {key: _map(value, function) for key, value in shards.items()}
    return [_map(value, function) for value in shards]


def _cut(shard: ShardedTensor, tensors: dict[str, Tensor]) -> Tensor:
    """This rank's part of the whole tensor that a shard belongs to."""
    if shard.key not in tensors:
        raise CheckpointError(f"weight {shard.key} is missing")
    whole = tensors[shard.key]
    if tuple(whole.shape) != tuple(shard.global_shape):
        raise CheckpointError(
            f"weight {shard.key} has shape {list(whole.shape)}, the model wants "
            f"{list(shard.global_shape)}"
        )
    # Experts are stacked along leading dimensions that a single expert's tensor does not have.
    stacked = shard.prepend_axis_num
    whole = whole[tuple(shard.global_offset[:stacked])]
    for dim, start in enumerate(shard.global_offset[stacked:]):
        whole = whole.narrow(dim, start, shard.local_shape[dim])
    return whole.to(shard.dtype)
