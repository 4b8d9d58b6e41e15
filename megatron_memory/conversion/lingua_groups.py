"""The reference's parameter groups, as its checkpoints hold them."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from megatron_memory.config import Config
from megatron_memory.optimizer import build_scheduler

# The order of its modules decides the groups: a new one begins where the values begin and end.
_ORDER = (
    *(f"attention.w{letter}." for letter in "qkvo"),
    *(f"feed_forward.w{number}." for number in (1, 3, 2)),
    "feed_forward.keys",
    "feed_forward.values",
    "feed_forward.value_proj.",
    "feed_forward.swilu_projection.",
    "feed_forward.gating.",
    "feed_forward.query_proj.",
    "attention_norm.",
    "ffn_norm.",
)
_LAST = ("tok_embeddings.", "norm.", "output.")


def groups_of(config: Config, step: int, names: Sequence[str]) -> dict[str, Any]:
    """The objects `optim.param_groups.*` of a checkpoint.

    Args:
        config: of the training.
        step: updates taken.
        names: of all parameters.
    """
    objects: dict[str, Any] = {}
    for number, (of_values, members) in enumerate(_groups(names)):
        peak = config.memory.value_lr if of_values else config.optimizer.lr
        decay = config.memory.value_weight_decay if of_values else config.optimizer.weight_decay
        settings = {
            "lr": _rate(config, of_values, step),
            "betas": (config.optimizer.adam_beta1, config.optimizer.adam_beta2),
            "eps": config.optimizer.adam_eps,
            "weight_decay": decay,
            "amsgrad": False,
            "maximize": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
            "initial_lr": peak,
            "params": members,
        }
        objects |= {f"optim.param_groups.{number}.{k}": v for k, v in settings.items()}
    return objects


def _groups(names: Sequence[str]) -> list[tuple[bool, list[str]]]:
    groups: list[tuple[bool, list[str]]] = []
    for name in sorted(names, key=_place):
        of_values = ".values" in name
        if not groups or groups[-1][0] != of_values:
            groups.append((of_values, []))
        groups[-1][1].append(name)
    return groups


def _place(name: str) -> tuple[int, int, str, bool]:
    if not name.startswith("layers."):
        place = next(i for i, prefix in enumerate(_LAST) if name.startswith(prefix))
        return 1_000_000, place, "", False
    _, layer, rest = name.split(".", 2)
    place = next(i for i, prefix in enumerate(_ORDER) if rest.startswith(prefix))
    module, _, kind = rest.rpartition(".")
    return int(layer), place, module, kind == "bias"


def _rate(config: Config, of_values: bool, step: int) -> float:
    """The learning rate after so many steps."""
    memory, optim = config.memory, config.optimizer
    pair = (memory.value_lr, memory.value_min_lr) if of_values else (optim.lr, optim.min_lr)
    # The schedule asks an optimizer for its groups only to set their rates.
    scheduler = build_scheduler(config, SimpleNamespace(param_groups=[]))  # type: ignore[arg-type]
    scheduler.step(step * config.training.global_batch_size)
    return scheduler.get_lr({"max_lr": pair[0], "min_lr": pair[1]})
