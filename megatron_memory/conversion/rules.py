"""Which tensors of another format make which of ours: one list for both directions.

A rule moves and permutes numbers and never computes with them. So it holds for weights and for an
optimizer's moments alike, and what was written reads back bit for bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from megatron_memory.conversion.lazy import LazyTensor, made_of
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError

Join = Callable[[Sequence[Tensor]], Tensor]
Split = Callable[[Tensor], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One of our tensors and the other format's that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    join: Join | None = None
    """Theirs to ours; None: one tensor that is the same in both."""
    split: Split | None = None
    """Ours to theirs, in their order."""
    copies: tuple[str, ...] = ()
    """Further names under which the other format keeps the very same tensor."""


def same(ours: str, theirs: str, *copies: str) -> Rule:
    """The same tensor under another name."""
    return Rule(ours=ours, theirs=(theirs,), copies=copies)


def to_ours(rules: Iterable[Rule], theirs: Tensors, where: object) -> Tensors:
    """Tensors by our names.

    Args:
        rules: of the model.
        theirs: all tensors that there are.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: names what is missing, or what no rule accounts for.
    """
    rules = list(rules)
    wanted = {name for rule in rules for name in rule.theirs}
    known = wanted | {name for rule in rules for name in rule.copies}
    _check_names(where, sorted(wanted - theirs.keys()), sorted(theirs.keys() - known))
    ours = {}
    for rule in rules:
        sources = [theirs[name] for name in rule.theirs]
        try:
            ours[rule.ours] = sources[0] if rule.join is None else made_of(sources, rule.join)
        # The function is tried on the shapes alone, and fails where they are not the model's.
        # TypeError: a product of the configuration's sizes that is no size any more.
        except (RuntimeError, TypeError) as error:
            shapes = ", ".join(f"{n} {list(theirs[n].shape)}" for n in rule.theirs)
            raise CheckpointError(
                f"{where}: {shapes} do not have the shapes that its configuration says ({error})"
            ) from error
    return ours


def twins(rules: Iterable[Rule], theirs: Tensors) -> list[tuple[str, LazyTensor, LazyTensor]]:
    """The copies that are there, each with the tensor that it must be equal to."""
    return [
        (copy, theirs[rule.theirs[0]], theirs[copy])
        for rule in rules
        for copy in rule.copies
        if copy in theirs
    ]


def to_theirs(rules: Iterable[Rule], ours: Tensors, where: object) -> Tensors:
    """Tensors by the other format's names, copies included.

    Raises:
        CheckpointError: names what is missing, or what no rule accounts for.
    """
    rules = list(rules)
    wanted = {rule.ours for rule in rules}
    _check_names(where, sorted(wanted - ours.keys()), sorted(ours.keys() - wanted))
    theirs: Tensors = {}
    for rule in rules:
        source = ours[rule.ours]
        parts = [source] if rule.split is None else _parts(source, rule.split)
        theirs |= dict(zip(rule.theirs, parts, strict=True))
        theirs |= dict.fromkeys(rule.copies, parts[0])
    return theirs


def _parts(source: LazyTensor, split: Split) -> list[LazyTensor]:
    def part(number: int) -> LazyTensor:
        return made_of([source], lambda tensors: split(tensors[0])[number])

    return [part(number) for number in range(len(split(source.on_meta())))]


def _check_names(where: object, missing: list[str], unknown: list[str]) -> None:
    problems = []
    if missing:
        problems.append(f"lacks {_listed(missing)}")
    if unknown:
        problems.append(f"holds {_listed(unknown)}, of which nothing is known")
    if problems:
        raise CheckpointError(
            f"{where} {' and '.join(problems)}. It is damaged, or its configuration describes "
            "another model"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
