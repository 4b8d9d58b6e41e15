"""A memory's tensors by name, and lazy tensors made of others, block by block of their rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.config.pools import Pool, memory_layers, memory_pools
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.exceptions import CheckpointError

DEGREES: Mapping[str, int] = {"exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2}
"""How an optimizer's state follows a gradient that is a constant times as large: to this power."""

Change = Callable[[str | None, str, LazyTensor], LazyTensor]
"""(kind, name, tensor) to what it becomes; kind is None for weights, else a moment's."""


def memory_prefixes(config: Config) -> list[str]:
    """Prefixes of the memory layers' own tensors, in the model's order."""
    beside = "memory." if config.memory.beside_mlp else ""
    return [f"decoder.layers.{layer}.mlp.{beside}" for layer in memory_layers(config)]


def table_names(config: Config) -> list[tuple[str, Pool, int]]:
    """Every value table: name, pool, and number within the pool (PEER's u is 0, its v 1)."""
    tables = ("values_u", "values_v") if config.memory.variant == "peer" else ("values",)
    return [
        (f"memory.{pool.name}.{table}.weight", pool, number)
        for pool in memory_pools(config)
        for number, table in enumerate(tables)
    ]


def changed(state: SavedState, change: Change) -> SavedState:
    """The state with a function applied to every tensor: weights, main weights, moments.

    Raises:
        CheckpointError: the optimizer has states whose meaning is not known.
    """
    unknown = sorted(state.moments.keys() - DEGREES.keys())
    if unknown:
        raise CheckpointError(
            f"the optimizer's states {', '.join(unknown)} cannot be grown: only "
            f"{', '.join(DEGREES)} can. Leave the optimizer out with --weights-only"
        )

    def apply(kind: str | None, tensors: Tensors) -> Tensors:
        return {name: change(kind, name, tensor) for name, tensor in tensors.items()}

    return dataclasses.replace(
        state,
        weights=apply(None, state.weights),
        main_weights=apply(None, state.main_weights),
        moments={kind: apply(kind, tensors) for kind, tensors in state.moments.items()},
    )


def added(
    state: SavedState, weights: Tensors, moment: Callable[[str, LazyTensor], LazyTensor]
) -> SavedState:
    """The state with further weights; `moment` makes the moments of each from (kind, weight)."""
    return dataclasses.replace(
        state,
        weights=state.weights | weights,
        main_weights=state.main_weights and state.main_weights | weights,
        moments={
            kind: tensors | {name: moment(kind, weight) for name, weight in weights.items()}
            for kind, tensors in state.moments.items()
        },
    )


def constant(shape: Sequence[int], value: float = 0.0) -> LazyTensor:
    """fp32, one number everywhere."""
    return LazyTensor(
        shape=tuple(shape),
        dtype=torch.float32,
        read_rows=lambda begin, end: torch.full((end - begin, *shape[1:]), value),
    )


def zero_moment(kind: str, weight: LazyTensor) -> LazyTensor:
    """Moments of a weight that no gradient has reached yet."""
    return constant(weight.shape)


def rowwise(source: LazyTensor, function: Callable[[Tensor], Tensor]) -> LazyTensor:
    """A function of each row alone: rows [R, ...] to [R, ...], which may be wider."""
    shown = function(source.on_meta())
    return LazyTensor(
        shape=tuple(shown.shape),
        dtype=shown.dtype,
        read_rows=lambda begin, end: function(source.read_rows(begin, end)),
        in_blocks=source.in_blocks,
    )


def with_columns(left: LazyTensor, right: LazyTensor) -> LazyTensor:
    """[R, C] and [R, C'] to [R, C + C'], of the left one's type."""
    assert left.num_rows == right.num_rows, f"{left.shape} beside {right.shape}"
    return LazyTensor(
        shape=(left.num_rows, left.shape[1] + right.shape[1]),
        dtype=left.dtype,
        read_rows=lambda begin, end: torch.cat(
            (left.read_rows(begin, end), right.read_rows(begin, end).to(left.dtype)), dim=1
        ),
    )


def with_rows(top: LazyTensor, bottom: LazyTensor) -> LazyTensor:
    """[R, ...] and [R', ...] to [R + R', ...], of the top one's type; both are read whole."""
    return LazyTensor(
        shape=(top.num_rows + bottom.num_rows, *top.shape[1:]),
        dtype=top.dtype,
        read_rows=lambda begin, end: torch.cat((top.read(), bottom.read().to(top.dtype)))[
            begin:end
        ],
        in_blocks=False,
    )
