"""Optimizer settings that stand both in the flags and in a checkpoint, and which of them count.

The schedule's (learning rates, decay) must agree, unless `--override-opt-param-scheduler` takes the
flags' or `--use-checkpoint-opt-param-scheduler` the checkpoint's. Adam's and SGD's own numbers are
always the flags'.
"""

from typing import Any

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.setup import TrainingSetup

_FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-iters (x --global-batch-size)",
    "lr_decay_steps": "--lr-decay-iters, else --train-iters (x --global-batch-size)",
    "lr_decay_style": "--lr-decay-style",
    "start_wd": "--start-weight-decay or --weight-decay",
    "end_wd": "--end-weight-decay or --weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters (x --global-batch-size)",
}
_VALUE_FLAGS = {
    "max_lr": "--memory-value-lr",
    "min_lr": "--memory-value-min-lr",
    "start_wd": "--memory-value-weight-decay",
    "end_wd": "--memory-value-weight-decay",
}
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_UPDATE_RULE = ("betas", "eps", "momentum", "dampening", "nesterov")


def load_optimizer(setup: TrainingSetup, loaded: dict[Any, Any]) -> None:
    """Load the optimizer's state; settings of its groups as the module says.

    Raises:
        CheckpointError: a group's schedule differs and no flag says which one counts.
    """
    ours = [{k: v for k, v in g.items() if k != "params"} for g in setup.optimizer.param_groups]
    saved = {_identity(group): group for group in _saved_groups(loaded)}
    schedules = []
    for own in ours:
        group = saved[_identity(own)]
        schedules.append(_schedule(setup, own, group))
        # Since 0.19 megatron-core finds a group by its schedule as well.
        _take(group, own, tuple(_VALUE_FLAGS))
    setup.optimizer.load_state_dict(loaded)
    for group, own, schedule in zip(setup.optimizer.param_groups, ours, schedules, strict=True):
        _take(group, own, _UPDATE_RULE)
        group.update(schedule)


def _saved_groups(loaded: dict[Any, Any]) -> list[dict[str, Any]]:
    """The groups of all optimizers, after `fit_groups`."""
    if "optimizer" in loaded or "param_groups" in loaded:
        return loaded.get("optimizer", loaded)["param_groups"]
    return [group for part in loaded.values() for group in _saved_groups(part)]


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    """What a group is, whatever its schedule."""
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in _IDENTITY)


def _schedule(setup: TrainingSetup, own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The schedule of a group that counts."""
    settings = setup.config.optimizer
    if not (settings.override_opt_param_scheduler or settings.use_checkpoint_opt_param_scheduler):
        _require_equal(saved, own, _VALUE_FLAGS if _is_of_values(setup, own) else _FLAGS)
    counts = own if settings.override_opt_param_scheduler else saved
    return {name: counts[name] for name in _VALUE_FLAGS if name in counts}


def _is_of_values(setup: TrainingSetup, group: dict[str, Any]) -> bool:
    # Megatron's name for parameters that are not reduced over all data-parallel ranks.
    return setup.config.memory.enabled and group["is_expert_parallel"]


def _take(group: dict[str, Any], own: dict[str, Any], names: tuple[str, ...]) -> None:
    group.update({name: own[name] for name in names if name in own})


def load_schedule(
    setup: TrainingSetup, saved: dict[str, Any] | None, consumed_samples: int
) -> None:
    """Move the schedule to where the training goes on.

    Args:
        setup: of this rank; its optimizer is loaded.
        saved: the checkpoint's schedule; None follows the flags alone.
        consumed_samples: the schedule's unit.

    Raises:
        CheckpointError: the schedules differ and no flag says which one counts.
    """
    # Megatron's adds to what the schedule has counted, as where a run goes back in the middle.
    setup.scheduler.num_steps = 0
    if saved is None:
        setup.scheduler.step(consumed_samples)
        return
    settings, own = setup.config.optimizer, setup.scheduler.state_dict()
    saved = dict(saved)
    if saved["wd_incr_style"] == own["wd_incr_style"] == "constant":
        # A longer training moves the end of a growth that does not take place.
        saved["wd_incr_steps"] = own["wd_incr_steps"]
    if not (settings.override_opt_param_scheduler or settings.use_checkpoint_opt_param_scheduler):
        _require_equal(saved, own, _FLAGS)
    setup.scheduler.load_state_dict(saved)


def _require_equal(saved: dict[str, Any], own: dict[str, Any], flags: dict[str, str]) -> None:
    differing = [
        f"{flag} {saved.get(name)} there, {own.get(name)} here"
        for name, flag in flags.items()
        if saved.get(name) != own.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint was trained on another schedule: {'; '.join(differing)}. Add "
            "--override-opt-param-scheduler to take the flags', or "
            "--use-checkpoint-opt-param-scheduler to take the checkpoint's"
        )
