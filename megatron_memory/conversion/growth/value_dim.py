"""Wider rows: D columns of a value table become D2, and the function stays as it is.

| variant | what is added | why nothing changes |
|---|---|---|
| memory+ | columns of the table, rows of W1, as fresh; zero columns of W2 | W2 [h; h'] = W2 h |
| pkm, projected | columns of the table, as fresh; zero columns of W2 | the same |
| pkm | the same, and a W2 | W2 = [I, 0] and a bias of 0: [I, 0] [y; y'] = y |
| peer | refused | rows are multiplied by the layer's input: their width is the hidden size |

The zero columns of W2 have the gradient g h'^T, which is not 0; the other new numbers follow from
the second step on. Keys stay as they are: `--memory-key-dim`, by default half of the value
dimension, is written down.

Moments of new numbers: exp_avg is 0, for they have had no gradient; exp_avg_sq is the mean of the
present columns' (for W1: rows'), so that the first updates are of the usual size. A new W2 has
none: 0.
"""

import dataclasses

import torch
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.problems import raise_problems
from megatron_memory.conversion.growth.fresh import fresh_layers, fresh_table
from megatron_memory.conversion.growth.tensors import (
    DEGREES,
    added,
    changed,
    constant,
    memory_prefixes,
    rowwise,
    table_names,
    with_columns,
    with_rows,
    zero_moment,
)
from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import ConfigurationError


def grow_value_dim(state: SavedState, value_dim: int, seed: int) -> SavedState:
    """The same function with wider rows; needs Megatron's groups of one process.

    Args:
        state: of a model with memory.
        value_dim: D2, more than now.
        seed: of the new columns.

    Raises:
        ConfigurationError: there is no memory, or it cannot have rows of this width.
        CheckpointError: the optimizer's states are of an unknown kind.
    """
    _check(state.config, value_dim)
    old = state.config.memory.value_dim
    memory = dataclasses.replace(state.config.memory, value_dim=value_dim)
    config = dataclasses.replace(state.config, memory=memory)
    raise_problems(memory_problems(config))
    fresh = fresh_layers(config, seed)
    tables = {
        name: fresh_table(config, pool, number, seed, first_column=old)
        for name, pool, number in table_names(config)
    }
    gates = _by_suffix(config, ("linear_fc1.weight", "linear_fc1.bias"))
    outputs = _by_suffix(config, ("linear_fc2.weight",))

    def change(kind: str | None, name: str, tensor: LazyTensor) -> LazyTensor:
        if name in tables:
            return _with_new_columns(kind, tensor, tables[name])
        if name in outputs:
            new = constant((tensor.num_rows, value_dim - old))
            return _with_new_columns(kind, tensor, new)
        if name in gates:
            return _with_new_rows(kind, tensor, fresh[name], old)
        return tensor

    grown = dataclasses.replace(changed(state, change), config=config)
    missing = {
        n for n in _by_suffix(config, ("linear_fc2.weight", "linear_fc2.bias")) if n in fresh
    }
    projections = {name: _identity(fresh[name]) for name in sorted(missing - state.weights.keys())}
    return added(grown, projections, zero_moment)


def _check(config: Config, value_dim: int) -> None:
    memory, hidden = config.memory, config.model.hidden_size
    if not memory.enabled:
        raise ConfigurationError(
            "the model has no memory that could grow: give it one with `add-memory`."
        )
    if memory.variant == "peer":
        raise ConfigurationError(
            f"--value-dim {value_dim}: with --memory-variant peer, rows are multiplied by the "
            f"layer's input, so that their width is the hidden size, {hidden}. Grow --half-keys."
        )
    if value_dim <= memory.value_dim:
        raise ConfigurationError(
            f"--value-dim {value_dim}: the memory's is {memory.value_dim}, and rows only become "
            "wider. Give more."
        )
    if memory.variant == "pkm" and value_dim == hidden:
        raise ConfigurationError(
            f"--value-dim {value_dim} is the hidden size, with which --memory-variant pkm has no "
            "output projection, and the model's would be lost. Give more, or less."
        )


def _by_suffix(config: Config, suffixes: tuple[str, ...]) -> set[str]:
    return {prefix + suffix for prefix in memory_prefixes(config) for suffix in suffixes}


def _with_new_columns(kind: str | None, tensor: LazyTensor, new: LazyTensor) -> LazyTensor:
    if kind is None:
        return with_columns(tensor, new)
    width = new.shape[1]

    def widened(rows: Tensor) -> Tensor:
        moments = rows.new_zeros(len(rows), width)
        if DEGREES[kind] == 2:
            moments = rows.mean(1, keepdim=True).expand(-1, width)
        return torch.cat((rows, moments), dim=1)

    return rowwise(tensor, widened)


def _with_new_rows(kind: str | None, tensor: LazyTensor, fresh: LazyTensor, old: int) -> LazyTensor:
    if kind is None:
        return with_rows(tensor, from_memory(fresh.read()[old:]))
    number = fresh.num_rows - old

    def moments() -> Tensor:
        present = tensor.read()
        new = present.new_zeros(number, *present.shape[1:])
        if DEGREES[kind] == 2:
            new = present.mean(0, keepdim=True).expand(number, *present.shape[1:])
        return torch.cat((present, new))

    return dataclasses.replace(
        tensor,
        shape=fresh.shape,
        read_rows=lambda begin, end: moments()[begin:end],
        in_blocks=False,
    )


def _identity(weight: LazyTensor) -> LazyTensor:
    """[I, 0] for a projection [hidden, D2], 0 for its bias."""
    if len(weight.shape) == 1:
        return constant(weight.shape)
    return from_memory(torch.eye(*weight.shape))
