"""Numbers that are none: where in the weights, the optimizer's states, losses and gradients.

Looked for before a checkpoint is written, and in a step whose loss or gradient norm is not finite.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_memory.exceptions import TrainingError
from megatron_memory.optimizer.states import states_by_parameter
from megatron_memory.training.setup import TrainingSetup
from megatron_memory.training.wrapping import unwrap

_MOST_NAMES = 4
_AT_ONCE = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Damage:
    """What one rank found."""

    stored: list[str]
    """In weights and states: they stay so."""
    has_bad_loss: bool = False
    gradients: list[str] = dataclasses.field(default_factory=list)
    figures: tuple[float | None, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Of a bad step; the same on every rank."""

    text: str
    """What was not finite, and on which rank."""
    figures: tuple[float | None, ...]
    """Each as a rank has it on which it is not finite."""
    is_stored: bool
    """Whether it is in a weight or a state, so that every later step has it as well."""


def check_finite(setup: TrainingSetup, iteration: int) -> None:
    """That every weight and every state of the optimizer is finite; a collective call.

    Raises:
        TrainingError: on every rank; it names ranks and parameters.
    """
    found = _of_all_ranks(_Damage(stored=_count(_stored(setup))))
    ranks = [f"rank {rank}: {_listed(d.stored)}" for rank, d in enumerate(found) if d.stored]
    if ranks:
        raise TrainingError(
            f"iteration {iteration}: not saved, for what is not finite would be in the checkpoint: "
            f"{_listed(ranks)}. Go back to the newest checkpoint with --load, and lower --lr or "
            "--memory-value-lr; --on-bad-step skip or rewind go on by themselves after a step "
            "whose loss or gradient is not finite"
        )


def why_not_finite(
    setup: TrainingSetup, losses: list[Tensor], figures: tuple[float | None, ...]
) -> Cause:
    """What caused a step's loss or gradient norm not to be finite; a collective call.

    Args:
        setup: of this rank, its gradients those of the step.
        losses: this rank's reports of its microbatches; none where it has no loss.
        figures: the loss and the norms, as this rank has them.
    """
    own = _Damage(
        stored=_count(_stored(setup)),
        has_bad_loss=bool(losses) and not bool(torch.stack(losses).isfinite().all()),
        gradients=_count(_gradients(setup)),
        figures=figures,
    )
    found = _of_all_ranks(own)
    kinds = (
        [f"rank {rank}: {_listed(d.stored)}" for rank, d in enumerate(found) if d.stored],
        [f"rank {rank}: the loss of its samples" for rank, d in enumerate(found) if d.has_bad_loss],
        [f"rank {rank}: {_listed(d.gradients)}" for rank, d in enumerate(found) if d.gradients],
    )
    # What stands first causes what stands behind it.
    first = next((lines for lines in kinds if lines), None)
    text = (
        "a sum of finite numbers overflowed" if first is None else "not finite: " + _listed(first)
    )
    worst = tuple(
        next((f for f in column if f is not None and not math.isfinite(f)), column[0])
        for column in zip(*(damage.figures for damage in found), strict=True)
    )
    return Cause(text=text, figures=worst, is_stored=bool(kinds[0]))


def _of_all_ranks(own: _Damage) -> list[_Damage]:
    found: list[_Damage] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def named_parameters(setup: TrainingSetup) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters by their names in a checkpoint: layers counted over all stages."""
    for chunk in setup.model:
        model = unwrap(chunk)
        layers = getattr(model.decoder, "layers", [])
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter


def _stored(setup: TrainingSetup) -> Iterator[tuple[str, Tensor]]:
    named = list(named_parameters(setup))
    yield from named
    names = {parameter: name for name, parameter in named}
    for parameter, states in states_by_parameter(setup.optimizer, [p for _, p in named]):
        for kind, state in states.items():
            yield f"{names[parameter]} (the optimizer's {kind})", state


def _gradients(setup: TrainingSetup) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in named_parameters(setup):
        gradient = getattr(parameter, "main_grad", None)
        if gradient is not None:
            yield f"{name} (gradient)", gradient


@torch.no_grad()
def _count(tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Those with elements that are not finite; waits once for the device where there are none."""
    named = [(name, tensor) for name, tensor in tensors if tensor.numel()]
    if not named:
        return []
    # A sum is not finite where an element is not, and needs no memory; it may also overflow.
    sums = torch.stack([tensor.sum(dtype=torch.float32) for _, tensor in named])
    suspects = (~sums.isfinite()).tolist()
    counted = []
    for (name, tensor), is_suspect in zip(named, suspects, strict=True):
        number = _number_not_finite(tensor) if is_suspect else 0
        if number:
            counted.append(f"{name}: {number:,} of {tensor.numel():,} elements")
    return counted


def _number_not_finite(tensor: Tensor) -> int:
    parts = tensor.detach().reshape(-1).split(_AT_ONCE)
    return sum(int((~part.isfinite()).sum()) for part in parts)


def _listed(lines: list[str]) -> str:
    more = f" and {len(lines) - _MOST_NAMES} more" if len(lines) > _MOST_NAMES else ""
    return "; ".join(lines[:_MOST_NAMES]) + more
