"""One growth, from its options to its report."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_memory.config import ParallelConfig
from megatron_memory.conversion.evaluate import one_process
from megatron_memory.conversion.folders import output_folder
from megatron_memory.conversion.growth.add import add_memory, largest_first_update
from megatron_memory.conversion.growth.half_keys import HalfKeyGrowth, grow_half_keys
from megatron_memory.conversion.growth.options import (
    AddMemory,
    Checking,
    Checkpoints,
    Grow,
    Initial,
)
from megatron_memory.conversion.growth.probe import Change, probe
from megatron_memory.conversion.growth.value_dim import grow_value_dim
from megatron_memory.conversion.megatron import Layout, read_megatron, write_megatron
from megatron_memory.conversion.progress import shown
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.conversion.unchanged import Unchanged
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.training.checkpoint.finding import locate

_VERIFIED_BY_ITSELF = 1_000_000_000
_MOST_ROWS_ON_TRITON = 64
_ROUNDING = 1e-4
"""Of logits in fp32, as a part of the largest: sums over copies of rows round otherwise."""

Notify = Callable[[str], None]


def run_add_memory(command: AddMemory, notify: Notify) -> None:
    """`add-memory`: read, add, write, compare.

    Raises:
        ConfigurationError, CheckpointError: it cannot be done; nothing is left behind.
    """
    memory = command.memory
    if memory.beside_mlp == command.place.replace:
        both = "both are given" if memory.beside_mlp else "neither is given"
        raise ConfigurationError(
            "--memory-beside-mlp keeps the chosen layers' MLPs and the model's function, --replace "
            f"puts the memory in the MLPs' place: {both}. Give one of them."
        )
    if not memory.enabled:
        raise ConfigurationError(
            "--memory-layers is missing: the layers to give a memory, for example centered:3:8."
        )
    save, load = Path(command.checkpoints.save), Path(command.checkpoints.load)
    unchanged = Unchanged(locate(load) if load.is_dir() else None)
    state = _read(command.checkpoints, notify)
    seed = _seed(state, command.initial, notify)
    with output_folder(save, load) as folder:
        with one_process(state.config):
            grown = add_memory(state, memory, seed)
        if grown.moments:
            optimizer = grown.config.optimizer
            most = largest_first_update(optimizer.adam_beta1, optimizer.adam_beta2)
            notify(
                f"optimizer: moments kept, those of new tensors 0 at step {grown.iteration}, so "
                f"that their first updates may be up to {most:.1f} learning rates (--adam-beta2 "
                f"{optimizer.adam_beta2}); --weights-only starts it anew"
            )
        after = _write(grown, command.checkpoints, folder, notify)
        change = _measure(state, after, command.checking, notify)
        unchanged.check()
        if change is not None and memory.beside_mlp and change.logits.largest_difference != 0:
            raise CheckpointError(
                f"the model with memory is not the dense one: {change.logits}. Nothing is written"
            )


def run_grow(command: Grow, notify: Notify) -> None:
    """`grow`: read, grow, write, compare.

    Raises:
        ConfigurationError, CheckpointError: it cannot be done; nothing is left behind.
    """
    growth = command.growth
    if growth.half_keys is None and growth.value_dim is None:
        raise ConfigurationError("give --half-keys for more rows, --value-dim for wider ones.")
    save, load = Path(command.checkpoints.save), Path(command.checkpoints.load)
    unchanged = Unchanged(locate(load) if load.is_dir() else None)
    state = _read(command.checkpoints, notify)
    seed = _seed(state, command.initial, notify)
    with output_folder(save, load) as folder:
        grown = state
        if growth.value_dim is not None:
            with one_process(state.config):
                grown = grow_value_dim(grown, growth.value_dim, seed)
        if growth.half_keys is not None:
            grown = grow_half_keys(
                grown,
                HalfKeyGrowth(
                    half_keys=growth.half_keys,
                    method=growth.method,
                    key_noise=growth.key_noise,
                    new_key_scale=growth.new_key_scale,
                    seed=seed,
                ),
            )
            if state.usage:
                notify("note: the counts of slots read begin anew, for the slots are others")
            _tell_top_k(grown, notify)
        after = _write(grown, command.checkpoints, folder, notify)
        change = _measure(state, after, command.checking, notify)
        unchanged.check()
        # Said so that NaN is refused.
        is_kept = change is None or change.logits.relative <= _ROUNDING
        if change is not None and _must_be_equal(command) and not is_kept:
            raise CheckpointError(
                f"the grown model is not the one it was: {change.logits}. Nothing is written"
            )


def _must_be_equal(command: Grow) -> bool:
    growth = command.growth
    return growth.half_keys is None or (growth.method == "exact" and growth.key_noise == 0)


def _tell_top_k(grown: SavedState, notify: Notify) -> None:
    memory = grown.config.memory
    notify(
        f"to train it: --memory-num-half-keys {memory.num_half_keys} --memory-top-k {memory.top_k}"
    )
    if memory.top_k > _MOST_ROWS_ON_TRITON:
        notify(
            f"note: Triton's kernels read {_MOST_ROWS_ON_TRITON} rows a head at most; this model "
            "needs --memory-kernels torch, on GPUs too"
        )


def _read(checkpoints: Checkpoints, notify: Notify) -> SavedState:
    """The checkpoint, as for one rank: what it is trained on later is for that run's flags."""
    load = Path(checkpoints.load)
    if not load.is_dir():
        raise CheckpointError(f"--load {load}: there is no such folder. Check the path")
    state = read_megatron(load)
    for note in state.notes:
        notify(f"note: {note}")
    if checkpoints.weights_only:
        if state.usage:
            notify("note: --weights-only leaves the counts of slots read out, too")
        state = state.without_optimizer()
    memory = dataclasses.replace(state.config.memory, parallel_size=1)
    config = dataclasses.replace(state.config, memory=memory, parallel=ParallelConfig())
    return dataclasses.replace(state, config=config)


def _seed(state: SavedState, initial: Initial, notify: Notify) -> int:
    seed = state.config.training.seed if initial.seed is None else initial.seed
    notify(f"new numbers are drawn with --seed {seed}")
    return seed


def _write(state: SavedState, checkpoints: Checkpoints, folder: Path, notify: Notify) -> SavedState:
    """What was written, read back."""
    with shown(state, "writing") as counted:
        notes = write_megatron(counted, folder, Path(checkpoints.save), Layout())
    for note in notes:
        notify(f"note: {note}")
    kept = "with the optimizer's state" if state.moments else "without an optimizer's state"
    notify(
        f"{checkpoints.save}: {len(state.weights)} tensors, {_num_parameters(state):,} parameters, "
        f"{kept}"
    )
    return read_megatron(folder)


def _num_parameters(state: SavedState) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in state.weights.values())


def _measure(
    before: SavedState, after: SavedState, checking: Checking, notify: Notify
) -> Change | None:
    if checking.verify is False:
        return None
    if checking.verify is None and _num_parameters(after) > _VERIFIED_BY_ITSELF:
        notify("not compared, as the model is large; --verify does it, in memory for both models")
        return None
    change = probe(before, after, checking)
    for line in change.lines():
        notify(line)
    return change
