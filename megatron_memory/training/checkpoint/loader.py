"""Loading checkpoints, on the layout that wrote them or another."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint import CheckpointException

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_layers
from megatron_memory.exceptions import CheckpointError
from megatron_memory.memory.usage import usage_key
from megatron_memory.runtime.distributed import seed_everything
from megatron_memory.training.checkpoint import folders, rng_state, state
from megatron_memory.training.checkpoint.agreement import ask_first_rank, raise_on_all
from megatron_memory.training.checkpoint.finding import (
    Found,
    Notify,
    comparing_content,
    find_checkpoint,
    start_position,
)
from megatron_memory.training.checkpoint.optimizer_kinds import (
    fit_groups,
    read_saved_main_weights,
)
from megatron_memory.training.checkpoint.reader import load_state
from megatron_memory.training.checkpoint.schedule import load_optimizer, load_schedule
from megatron_memory.training.setup import TrainingSetup
from megatron_memory.training.wrapping import unwrap


def load_checkpoint(setup: TrainingSetup, found: Found, notify: Notify) -> None:
    """Load a checkpoint into the model, the optimizer, the schedule and the generators.

    A collective call. `notify` receives a line for whatever is omitted.

    Raises:
        CheckpointError: on every rank: its tensors or its schedule do not fit, cannot be read, or
            are not what was written.
    """
    checkpoint = setup.config.checkpoint
    with comparing_content(found, checkpoint.checksums, notify):
        if checkpoint.finetune:
            _load_parts(setup, found)
        else:
            _load_all(setup, found, notify)
    if checkpoint.finetune:
        notify(f"loaded the weights of {found.folder}")
    else:
        notify(f"loaded {found.folder}, iteration {found.common['iteration']}")


def _load_all(setup: TrainingSetup, found: Found, notify: Notify) -> None:
    checkpoint = setup.config.checkpoint
    position = start_position(found, setup.config)
    _load_parts(
        setup,
        found,
        with_optimizer=not checkpoint.no_load_optim,
        with_generators=_generators_fit(setup, found, notify),
        with_usage=_usage_fits(setup, found, notify),
    )
    # A converted checkpoint has the states of an optimizer and no schedule: the flags' counts.
    schedule = None if checkpoint.no_load_optim else found.common.get("opt_param_scheduler")
    load_schedule(setup, schedule, position.consumed_samples)


def load_weights(
    model: list[torch.nn.Module],
    config: Config,
    vocab_size: int,
    load: Path,
    notify: Notify = lambda line: None,
) -> Path:
    """Load the weights alone, for use without an optimizer; a collective call.

    Args:
        model: chunks of this rank, in Megatron's wrappers or not.
        config: describes the model.
        vocab_size: before padding.
        load: a directory with checkpoints, or one checkpoint's folder.
        notify: receives a line where its content cannot be checked.

    Returns:
        the checkpoint's folder.

    Raises:
        CheckpointError: see `find_checkpoint`; or there is no checkpoint.
    """
    found = ask_first_rank(lambda: find_checkpoint(load, config, vocab_size))
    if found is None:
        raise CheckpointError(f"--load {load}: there is no checkpoint. Check the path")
    wanted = state.without_missing_extra_states(state.sharded_model(model), found.objects)
    with comparing_content(found, config.checkpoint.checksums, notify):
        _apply_weights(model, _read_tensors(wanted, found))
    return found.folder


def _load_parts(
    setup: TrainingSetup,
    found: Found,
    *,
    with_optimizer: bool = False,
    with_generators: bool = False,
    with_usage: bool = False,
) -> None:
    model = state.sharded_model(setup.model)
    optimizer: state.StateDict = {}
    if with_optimizer:
        optimizer = state.sharded_optimizer(setup, model, is_loading=True)
        read_saved_main_weights(optimizer, found.shapes)
    wanted = state.without_missing_extra_states(model, found.objects)
    if with_generators:
        wanted |= state.sharded_generators(setup)
    if with_usage:
        wanted["usage"] = setup.usage.empty_totals()
    loaded = _read_tensors(wanted, found)
    _apply_weights(setup.model, loaded)
    if with_optimizer:
        # By itself, for the main weights may come from tensors that the model reads as well.
        states = _read_tensors(optimizer, found)["optimizer"]
        step = found.common.get("optimizer_step")
        load_optimizer(setup, fit_groups(states, setup.optimizer, step))
    else:
        setup.optimizer.reload_model_params()
    if with_usage:
        # megatron-core leaves out what is empty, as on pipeline ranks without memory layers.
        setup.usage.restore(loaded.get("usage", {}))
    if with_generators:
        rng_state.restore(loaded["rng_state"], setup.backend.device)


def _usage_fits(setup: TrainingSetup, found: Found, notify: Notify) -> bool:
    """Whether to go on from the checkpoint's counts of reads; where not, they begin here."""
    if not setup.usage.is_on:
        return False
    slots = (setup.config.memory.num_values,)
    keys = [usage_key(layer) for layer in memory_layers(setup.config)]
    since = found.common.get(state.USAGE_SINCE)
    if since is not None and all(found.shapes.get(key) == slots for key in keys):
        setup.usage.first_sample = since
        return True
    setup.usage.first_sample = found.common["consumed_samples"]
    notify("slot usage is counted from here on: the checkpoint holds no counts of these slots")
    return False


def _generators_fit(setup: TrainingSetup, found: Found, notify: Notify) -> bool:
    """Whether to load the generators' states; where not, they are seeded for this iteration."""
    if setup.config.checkpoint.no_load_rng:
        return False
    saved, ours = found.common["layout"], state.layout(setup.config)
    reason = None
    if not found.common["has_generators"]:
        reason = "the checkpoint holds no generator states"
    elif saved != ours:
        changed = ", ".join(f"{n} {saved[n]} to {ours[n]}" for n in ours if saved[n] != ours[n])
        reason = f"the layout changed ({changed})"
    elif found.common["device"] != setup.backend.device.type:
        reason = f"it was written on {found.common['device']}"
    if reason is None:
        return True
    seed_everything(setup.config.training.seed + found.common["iteration"])
    notify(f"random numbers are seeded anew: {reason}")
    return False


def _read_tensors(wanted: state.StateDict, found: Found) -> state.StateDict:
    """Read this rank's part of what is wanted; a collective call."""
    raise_on_all(_mismatch(wanted, found))
    problem = None
    with _weights_only(), warnings.catch_warnings():
        # megatron-core 0.16 calls torch.distributed.checkpoint by an older name.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            loaded = load_state(wanted, found.folder, found.metadata, found.common)
        except CheckpointException as error:
            problem = f"{found.folder} cannot be read: {_first_failure(error)}"
        except (CheckpointingException, OSError, RuntimeError) as error:
            problem = f"{found.folder} cannot be read: {error}"
    raise_on_all(problem)
    return loaded


def _first_failure(error: CheckpointException) -> str:
    """What went wrong, without the traces that torch adds."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause or type(cause).__name__}"


def _mismatch(wanted: state.StateDict, found: Found) -> str | None:
    differing = []
    for key, shape in state.expected_shapes(wanted).items():
        saved = found.shapes.get(key)
        if saved is None:
            differing.append(f"{key} is missing")
        elif shape is not None and shape != saved:
            differing.append(f"{key} is {list(saved)} there, {list(shape)} here")
    if not differing:
        return None
    more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
    return (
        f"{found.folder} holds another model or optimizer: {'; '.join(differing[:8])}{more}. "
        f"Compare its {folders.CONFIG_FILE} with the flags; --no-load-optim loads it without the "
        "optimizer"
    )


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch's checkpoint planner loads objects with weights_only=False; this overrules it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _apply_weights(model: list[torch.nn.Module], loaded: state.StateDict) -> None:
    names = ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]
    for name, chunk in zip(names, model, strict=True):
        result = unwrap(chunk).load_state_dict(loaded[name], strict=False)
        lacking = [key for key in result.missing_keys if not state.is_extra_state(key)]
        assert not lacking and not result.unexpected_keys, f"what was read is not whole: {result}"
