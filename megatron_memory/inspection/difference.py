"""How two checkpoints differ: settings, tensors that only one has, and numbers."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.config.flags import all_flags
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.options import Format
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.inspection.contents import NO_MODEL, Contents, open_checkpoint
from megatron_memory.inspection.figures import is_table
from megatron_memory.training.checkpoint.architecture import decides_model

_SLICE = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class SettingDifference:
    """A flag's values."""

    key: str
    first: Any
    second: Any
    is_of_model: bool
    """Whether it decides the model, and not only how it is trained or laid out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """Of two tensors of one shape, compared as numbers; NaN equals NaN."""

    name: str
    relative_norm: float
    """Norm of the difference, as a part of the first one's norm; infinite where that is 0."""
    largest: float
    """Largest difference of two elements."""
    share_changed: float
    """Part of the elements that differ."""
    share_of_rows_changed: float | None
    """Part of a table's or the embedding's rows that differ; None of other tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two checkpoints."""

    settings: tuple[SettingDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Shapes of tensors whose shapes differ."""
    retyped: dict[str, tuple[torch.dtype, torch.dtype]]
    """Types of tensors whose types differ; their numbers are compared all the same."""
    changed: tuple[TensorDifference, ...]
    """Largest relative norm first."""
    num_equal: int
    """Tensors with the same numbers."""
    unreadable: tuple[str, ...]

    @property
    def is_none(self) -> bool:
        """Whether both hold the same model, to the last number."""
        lists = self.only_first, self.only_second, self.reshaped, self.retyped, self.changed
        of_model = any(setting.is_of_model for setting in self.settings)
        return not (any(lists) or self.unreadable or of_model)


def open_both(
    first: Path, second: Path, format_name: Format | None, *, raw: bool
) -> tuple[Contents, Contents]:
    """Two checkpoints whose tensors have names of one kind: the files' own where one cannot be
    read as a model.

    Raises:
        CheckpointError: one cannot be opened.
    """
    one, another = (open_checkpoint(path, format_name, raw=raw) for path in (first, second))
    if one.is_raw == another.is_raw:
        return one, another
    one, another = (
        opened if opened.is_raw else open_checkpoint(opened.load, opened.format, raw=True)
        for opened in (one, another)
    )
    return one, another


def compare(
    first: Contents,
    second: Contents,
    glob: str = "*",
    on_read: Callable[[int], object] = lambda count: None,
) -> Difference:
    """Read the tensors that both have and whose names match, and compare them."""
    ones, others = (_matching(contents, glob) for contents in (first, second))
    common = [name for name in ones if name in others]
    shapes = {name: (ones[name].shape, others[name].shape) for name in common}
    types = {name: (ones[name].dtype, others[name].dtype) for name in common}
    changed, num_equal = [], 0
    unreadable = [*_damage(first), *_damage(second)]
    for name in common:
        if shapes[name][0] != shapes[name][1]:
            continue
        try:
            found = compare_tensors(name, ones[name], others[name], on_read)
        except CheckpointError as error:
            unreadable.append(f"{name}: {error}")
            continue
        if found.share_changed:
            changed.append(found)
        else:
            num_equal += 1
    return Difference(
        settings=tuple(_settings(first.config, second.config)),
        only_first=tuple(name for name in ones if name not in others),
        only_second=tuple(name for name in others if name not in ones),
        reshaped={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        retyped={name: pair for name, pair in types.items() if pair[0] != pair[1]},
        changed=tuple(sorted(changed, key=lambda found: -found.relative_norm)),
        num_equal=num_equal,
        unreadable=tuple(unreadable),
    )


def _damage(contents: Contents) -> Iterator[str]:
    """What is wrong with a checkpoint: what cannot be read as a model may be another one, whatever
    its tensors. Where no config.yaml says which, only the tensors are compared."""
    says_nothing = contents.format == "megatron" and contents.config is None
    for problem in contents.damage:
        if not (says_nothing and problem.startswith(NO_MODEL)):
            yield f"{contents.folder}: {problem}"


def _matching(contents: Contents, glob: str) -> Tensors:
    """Without the copies that a format keeps of a table: another format has none."""
    return {
        name: tensor
        for name, tensor in contents.tensors.items()
        if fnmatchcase(name, glob) and name not in contents.copies
    }


def compare_tensors(
    name: str,
    one: LazyTensor,
    another: LazyTensor,
    on_read: Callable[[int], object] = lambda count: None,
) -> TensorDifference:
    """Read two tensors of one shape, block by block.

    Raises:
        CheckpointError: one cannot be read.
    """
    sums = _Sums()
    has_rows = len(one.shape) == 2 and (is_table(name) or "word_embeddings" in name)
    rows = 0
    whole = one if another.in_blocks else another
    for begin, end in whole.blocks():
        pair = one.read_rows(begin, end), another.read_rows(begin, end)
        on_read(sum(part.nbytes for part in pair))
        for slices in zip(*(part.reshape(-1).split(_SLICE) for part in pair), strict=True):
            sums.add(*slices)
        if has_rows:
            rows += int(_differs(*pair).any(1).sum())
    return TensorDifference(
        name=name,
        relative_norm=sums.relative_norm(),
        largest=sums.largest,
        share_changed=sums.changed / max(1, sums.count),
        share_of_rows_changed=rows / max(1, one.num_rows) if has_rows else None,
    )


def _differs(one: Tensor, another: Tensor) -> Tensor:
    return (one != another) & ~(one.isnan() & another.isnan())


class _Sums:
    def __init__(self) -> None:
        self.count = self.changed = 0
        self.squares = self.own_squares = self.largest = 0.0

    def add(self, one: Tensor, another: Tensor) -> None:
        self.count += one.numel()
        # By itself, for inf - inf is no number.
        unlike = _differs(one, another)
        num_unlike = int(unlike.sum())
        self.changed += num_unlike
        own = one.double()
        self.own_squares += own[own.isfinite()].square().sum().item()
        if num_unlike:
            distance = (own[unlike] - another[unlike].double()).abs()
            distance = distance.nan_to_num(nan=math.inf, posinf=math.inf)
            self.squares += distance.square().sum().item()
            self.largest = max(self.largest, distance.max().item())

    def relative_norm(self) -> float:
        if not self.squares:
            return 0.0
        return math.sqrt(self.squares / self.own_squares) if self.own_squares else math.inf


def _settings(first: Config | None, second: Config | None) -> Iterator[SettingDifference]:
    if first is None or second is None:
        return
    same_tables = memory_pools(first) == memory_pools(second)
    for key, flag in all_flags().items():
        name = (flag.component, flag.field.name)
        pair = [getattr(getattr(config, name[0]), name[1]) for config in (first, second)]
        is_of_model = decides_model(*name)
        if name == ("memory", "layers"):
            # The same layers may be written in several ways.
            pair = [memory_layers(config) for config in (first, second)]
            is_of_model = True
        if name in (("memory", "share_scope"), ("memory", "share_groups")):
            is_of_model = not same_tables
        if pair[0] != pair[1]:
            yield SettingDifference(key=key, first=pair[0], second=pair[1], is_of_model=is_of_model)
