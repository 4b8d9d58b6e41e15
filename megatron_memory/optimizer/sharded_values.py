"""The values' optimizer states in a checkpoint: every rank writes and reads its own shard.

megatron-core's `fully_reshardable` format gathers the states of a data-parallel group's whole slice
on each of its ranks, three fp32 tensors, to save them; and reads the whole slice on each to load
them: 24 GiB a rank for a slice of 2^31 elements. Here nothing is gathered. The tensors in a
checkpoint, and their names, are the same, so that either way reads what the other one wrote.

A shard of the distributed optimizer is a flat range of each chunk's row-major [rows, C]: at most
three rectangles, of which each has its own place in the table's [S, D].
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

_FORMAT = "fully_reshardable"


def sharded_value_states(
    optimizer: DistributedOptimizer, model: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """The optimizer's sharded state dict, with what is saved or loaded.

    Args:
        optimizer: of the value tables alone.
        model: the model's sharded state dict, with the tables' parameters themselves.
        is_loading: the states will be read, straight into the optimizer's own memory; makes them
            where there are none yet.
    """
    precise = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert not precise, "its states are not what it computes with: they cannot be read in place"
    if is_loading:
        optimizer.load_state_dict(optimizer.state_dict())
    chunks = {
        tensor.data: tensor for tensor in nested_values(model) if isinstance(tensor, ShardedTensor)
    }
    states = {}
    for chunk, ranges in _own_ranges(optimizer).items():
        for name, state in optimizer._get_main_param_and_optimizer_states(chunk).items():
            if name == "step":  # Transformer Engine's; it is in the parameter group, too
                continue
            for piece in _pieces(chunks[chunk], state, ranges, name, optimizer):
                states[f"{piece.key} {piece.global_offset}"] = piece
    return {
        **optimizer.state_dict(),
        "param_state": states,
        "param_state_sharding_type": _FORMAT,
    }


def without_tensors(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A loaded `sharded_value_states` without the tensors, which are in their places already."""
    tensors = ("param_state", "param_state_sharding_type")
    return {name: value for name, value in state_dict.items() if name not in tensors}


def _own_ranges(optimizer: DistributedOptimizer) -> dict[Tensor, tuple[int, int]]:
    """First and last element, the latter not included, of each chunk that this rank updates."""
    return {
        chunk: (ranges["param"].start, ranges["param"].end)
        for buffer in optimizer.gbuf_ranges
        for buckets in buffer.values()
        for bucket in buckets
        for chunk, ranges in bucket["param_map"].items()
    }


def _pieces(
    chunk: ShardedTensor,
    state: Tensor,
    own: tuple[int, int],
    name: str,
    optimizer: DistributedOptimizer,
) -> Iterator[ShardedTensor]:
    """The flat state of a chunk's range `own`, as rectangles of the table."""
    first, last = own
    assert state.shape == (last - first,), f"{name} is no flat range of {chunk.key}"
    for box in rectangles(first, last, columns=chunk.local_shape[1]):
        yield dataclasses.replace(
            chunk,
            key=f"optimizer.state.{name}.{chunk.key}",
            data=state[box.first - first : box.last - first].view(box.shape),
            dtype=state.dtype,
            local_shape=box.shape,
            global_offset=(
                chunk.global_offset[0] + box.offset[0],
                chunk.global_offset[1] + box.offset[1],
            ),
            replica_id=(*chunk.replica_id[:2], optimizer.distributed_optimizer_instance_id),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rectangle:
    """Part of a row-major block that is contiguous in memory, too."""

    first: int
    """Its first element in the flat block."""
    last: int
    """The element behind its last one."""
    offset: tuple[int, int]
    """Row and column of its first element."""
    shape: tuple[int, int]
    """Rows and columns."""


def rectangles(first: int, last: int, *, columns: int) -> Iterator[Rectangle]:
    """The flat range [first, last) of a block with that many columns.

    Part of a row, whole rows and part of a row, as far as there are any.
    """
    while first < last:
        row, column = divmod(first, columns)
        whole_rows = 0 if column else (last - first) // columns
        shape = (whole_rows, columns) if whole_rows else (1, min(columns - column, last - first))
        end = first + shape[0] * shape[1]
        yield Rectangle(first=first, last=end, offset=(row, column), shape=shape)
        first = end
