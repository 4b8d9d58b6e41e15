"""What the figures of all tensors say together: damage, duplicates, and what does nothing."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.inspection.contents import Contents
from megatron_memory.inspection.figures import Figures, figures_of
from megatron_memory.inspection.slot_usage import LayerUsage, slot_usage

_MAIN_WEIGHT = re.compile(r"optimizer\.state\.(fp32_)?param\.")
_TABLE_COPY = re.compile(r"(model|optim\.state)\.layers\.\d+\.feed_forward\.(values\w*\.weight.*)")
_EMBEDDINGS = re.compile(r".*(embed_tokens|lm_head|tok_embeddings|output|word_embeddings)\..*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Tensors with the same bytes."""

    names: tuple[str, ...]
    num_bytes: int
    """Of all but the first."""
    reason: str | None
    """Why they are to be the same; None where nothing says so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Of one checkpoint."""

    figures: dict[str, Figures]
    """Of the tensors that were read, by name."""
    damage: tuple[str, ...]
    """What makes it unfit for use."""
    notes: tuple[str, ...]
    """What may be meant."""
    duplicates: tuple[Duplicates, ...]
    usage: dict[str, LayerUsage]
    """Of memory layers whose reads are counted, by their numbers."""


def find(
    contents: Contents, glob: str, on_read: Callable[[int], object] = lambda count: None
) -> Findings:
    """Read the tensors whose names match, one after the other."""
    chosen = matching(contents.tensors, glob)
    kinds = Counter(_kind(tensor) for tensor in chosen.values())
    figures: dict[str, Figures] = {}
    unreadable = []
    usage: dict[str, LayerUsage] = {}
    for name, tensor in chosen.items():
        try:
            figures[name] = figures_of(
                name, tensor, with_digest=kinds[_kind(tensor)] > 1, on_read=on_read
            )
            usage |= slot_usage({name: tensor})
        except CheckpointError as error:
            unreadable.append(f"{name}: {error}")
    return Findings(
        figures=figures,
        damage=(*contents.damage, *unreadable, *_not_finite(figures), *_unequal(contents, figures)),
        notes=(*contents.notes, *_dead(figures)),
        duplicates=tuple(_duplicates(contents, chosen, figures)),
        usage=usage,
    )


def matching(tensors: Tensors, glob: str) -> Tensors:
    """The tensors whose names match.

    Raises:
        CheckpointError: none does.
    """
    chosen = {name: tensor for name, tensor in tensors.items() if fnmatchcase(name, glob)}
    if not chosen:
        shown = ", ".join(list(tensors)[:4]) or "none"
        raise CheckpointError(f"--tensors {glob}: matches none of the tensors ({shown} ...)")
    return chosen


def _kind(tensor: LazyTensor) -> tuple:
    return tensor.shape, tensor.dtype


def _not_finite(figures: Mapping[str, Figures]) -> Iterator[str]:
    for name, found in figures.items():
        if found.num_nan or found.num_infinite:
            yield f"{name} has {found.num_nan:,} NaN and {found.num_infinite:,} infinite numbers"


def _unequal(contents: Contents, figures: Mapping[str, Figures]) -> Iterator[str]:
    for copy, first in contents.copies.items():
        if copy in figures and first in figures and figures[copy].digest != figures[first].digest:
            yield f"{copy} is to be a copy of {first}, and differs from it"


def _dead(figures: Mapping[str, Figures]) -> Iterator[str]:
    zero = [n for n, found in figures.items() if found.is_constant and not found.highest]
    if zero:
        # Biases are zeros to begin with.
        yield f"all zeros: {_listed(sorted(zero, key=lambda name: name.endswith('.bias')))}"
    for name, found in figures.items():
        if found.num_zero_rows:
            yield f"{name}: {found.num_zero_rows:,} rows are zero"
        if found.num_repeated_rows:
            yield f"{name}: {found.num_repeated_rows:,} rows repeat another row"
        if found.num_tiny_keys:
            yield (
                f"{name}: {found.num_tiny_keys:,} half-keys have less than a thousandth of the "
                "median norm"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _duplicates(
    contents: Contents, tensors: Tensors, figures: Mapping[str, Figures]
) -> Iterator[Duplicates]:
    groups: dict[tuple, list[str]] = {}
    for name, found in figures.items():
        # Tensors of one number, as norms are at first, are equal without being copies.
        if found.digest is not None and not found.is_constant:
            groups.setdefault((_kind(tensors[name]), found.digest), []).append(name)
    for names in groups.values():
        if len(names) > 1:
            yield Duplicates(
                names=tuple(names),
                num_bytes=sum(tensors[name].num_bytes for name in names[1:]),
                reason=_reason(contents, names),
            )


def _reason(contents: Contents, names: Iterable[str]) -> str | None:
    names = list(names)
    if len({contents.copies.get(name, name) for name in names}) == 1:
        return "a shared table, which the format keeps once a layer"
    tables = {match and match.group(1, 2) for match in map(_TABLE_COPY.fullmatch, names)}
    if len(tables) == 1 and None not in tables:
        return "a shared table, which the format keeps once a layer"
    if len({_MAIN_WEIGHT.sub("", name, count=1) for name in names}) == 1:
        return "main weights of an optimizer whose weights have the same type"
    if all(_EMBEDDINGS.fullmatch(name) for name in names):
        return "the output layer is tied to the embedding"
    return None
