"""What is different between the run that wrote a checkpoint and the one that goes on with it."""

from collections.abc import Iterator

from megatron_memory.config import Config
from megatron_memory.config.flags import all_flags
from megatron_memory.data.datasets import Samples
from megatron_memory.exceptions import CheckpointError, DataError
from megatron_memory.training.checkpoint.agreement import raise_on_all
from megatron_memory.training.checkpoint.architecture import decides_model
from megatron_memory.training.checkpoint.data_order import order_changes, read_parts
from megatron_memory.training.checkpoint.finding import Found, Notify

DATA_ORDER = "data_order"

_NO_MATTER: dict[str, tuple[str, ...] | None] = {
    "checkpoint": None,
    "logging": None,
    # What changes with the layout is the last digits; generators that do not fit are told apart.
    "parallel": None,
    "training": ("eval_interval", "eval_iters", "exit_interval", "exit_duration_in_mins")
    + ("dry_run",),
    "data": ("num_workers", "data_cache_path", "make_vocab_size_divisible_by"),
    "model": ("init_method_std", "max_position_embeddings"),
    "memory": ("kernels", "log_usage", "parallel_size", "replicate_pool", "layers")
    + ("share_scope", "share_groups"),
    "optimizer": ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"),
}
"""Fields that change nothing of what is trained, or that are compared elsewhere; None: all."""
_SCHEDULE = ("lr", "min_lr", "lr_", "weight_decay", "start_weight_decay", "end_weight_decay")
_DATA = (
    "training.seed",
    "model.seq_length",
    "data.data_path",
    "data.train_data_path",
    "data.split",
)
_NUM_SAMPLES = ("training.global_batch_size", "training.train_iters")


def check_optimizer_kind(found: Found, config: Config) -> None:
    """That the states in a checkpoint are of this run's optimizer.

    Raises:
        CheckpointError: they are of another.
    """
    saved = found.saved
    if saved is None or config.checkpoint.no_load_optim:
        return
    for name, flag in (
        ("optimizer", "--optimizer"),
        ("apply_weight_decay_to_all", "--apply-weight-decay-to-all"),
    ):
        there, here = getattr(saved.optimizer, name), getattr(config.optimizer, name)
        if there != here:
            raise CheckpointError(
                f"{found.folder} holds the states of another optimizer: {flag} {there} there, "
                f"{here} here. Give this flag the checkpoint's value, or add --no-load-optim to "
                "go on with the weights and a new optimizer"
            )


def setting_changes(saved: Config, ours: Config) -> Iterator[str]:
    """Settings that make the run another from here on, each as `--flag VALUE there, VALUE here`."""
    for flag in all_flags().values():
        component, name = flag.component, flag.field.name
        unimportant = _NO_MATTER.get(component, ())
        if unimportant is None or name in unimportant or decides_model(component, name):
            continue
        if ours.optimizer.use_checkpoint_opt_param_scheduler and _is_of_schedule(component, name):
            continue
        there, here = (getattr(getattr(c, component), name) for c in (saved, ours))
        if there != here:
            yield f"{flag.spelled} {_shown(there)} there, {_shown(here)} here"


def _is_of_schedule(component: str, name: str) -> bool:
    if component == "memory":
        return name in ("value_lr", "value_min_lr", "value_weight_decay")
    return component == "optimizer" and name.startswith(_SCHEDULE)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def check_data_order(found: Found, config: Config, train: Samples | None, notify: Notify) -> None:
    """That no sample is repeated or left out from here on; a collective call.

    With `--allow-changed-data-order` it is only said.

    Raises:
        CheckpointError: on every rank: the data or its order is not the checkpoint's.
    """
    if config.checkpoint.finetune or train is None:
        return
    consumed, done = found.common["consumed_samples"], found.common["iteration"]
    if done >= config.training.train_iters:
        return
    saved = found.common.get(DATA_ORDER)
    if saved is None:
        changes = _differing(_DATA, found.saved, config) if consumed else []
        if consumed and not changes:
            notify(f"{found.folder} does not say which data was used: it is not compared")
    else:
        changes = _changes_on_a_rank(saved, train, consumed)
        changes += _differing(_DATA + _NUM_SAMPLES, found.saved, config) if changes else []
    problem = None
    if changes:
        problem = (
            f"{found.folder} has used {consumed} samples of other data, or of another order: "
            f"{'; '.join(changes)}. To go on from there would repeat some samples and omit "
            "others. Give these flags the checkpoint's values. Where that is not possible, as in a "
            "longer training or with other data, --allow-changed-data-order goes on all the same, "
            f"from sample {consumed} of the new order"
        )
    if not config.checkpoint.allow_changed_data_order:
        raise_on_all(problem)
    elif problem is not None:
        notify(f"--allow-changed-data-order: samples may repeat: {'; '.join(changes)}")


def _changes_on_a_rank(saved: object, train: Samples, consumed: int) -> list[str]:
    try:
        return order_changes(saved, read_parts(train, consumed))
    # The other ranks must hear of it, or they wait for this one.
    except (DataError, OSError, IndexError) as error:
        return [f"the samples that were used cannot be read: {error}"]


def _differing(fields: tuple[str, ...], saved: Config | None, ours: Config) -> list[str]:
    changes = []
    for flag in all_flags().values() if saved is not None else ():
        there, here = (
            getattr(getattr(config, flag.component), flag.field.name) for config in (saved, ours)
        )
        if f"{flag.component}.{flag.field.name}" in fields and there != here:
            changes.append(f"{flag.spelled} {_shown(there)} there, {_shown(here)} here")
    return changes
