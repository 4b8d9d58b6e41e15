"""Which datasets a run reads and in what proportion, from Megatron's flags."""

import dataclasses
import math
import re
from collections.abc import Sequence
from decimal import Decimal

from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split

from megatron_memory.data.indexed.format import named_twice
from megatron_memory.exceptions import ConfigurationError

SPLIT_NAMES = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blend:
    """Datasets that are read mixed."""

    flag: str
    """The flag that names them, for messages."""
    prefixes: list[str]
    weights: list[float] | None
    """One for each prefix; None: in proportion to their sizes, each at most once through."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSources:
    """Where training, validation and test read: parts of one blend, or a blend each."""

    shared: Blend | None
    split: str | None
    """With `shared`: the parts, as --split has them."""
    per_split: tuple[Blend | None, Blend | None, Blend | None]
    """Without `shared`: train, valid, test."""

    def blend_of(self, split_index: int) -> Blend | None:
        """What split 0, 1 or 2 (train, valid, test) reads; None where it has no data."""
        if self.shared is None:
            return self.per_split[split_index]
        return self.shared if self.ranges()[split_index] is not None else None

    def ranges(self) -> list[tuple[float, float] | None]:
        """For each split its part of every dataset, as fractions of the number of sequences."""
        if self.shared is None:
            return [None if blend is None else (0.0, 1.0) for blend in self.per_split]
        assert self.split is not None, "a shared blend comes with a split"
        bounds = [0.0]
        for share in parse_and_normalize_split(self.split):
            # The same sum in the same order as megatron-core's, so that the bounds are its own.
            bounds.append(bounds[-1] + share)
        return [
            (begin, end) if end > begin else None
            for begin, end in zip(bounds, bounds[1:], strict=False)
        ]

    def prefixes(self) -> list[str]:
        """All datasets, each once."""
        blends = [self.shared, *self.per_split]
        return list(dict.fromkeys(p for blend in blends if blend for p in blend.prefixes))


def data_sources(
    *,
    data_path: Sequence[str] = (),
    split: str | None = None,
    train_data_path: Sequence[str] = (),
    valid_data_path: Sequence[str] = (),
    test_data_path: Sequence[str] = (),
) -> DataSources:
    """Read the data flags.

    Raises:
        ConfigurationError: flags missing, contradicting each other, or with bad numbers.
    """
    own_paths = {
        "--train-data-path": train_data_path,
        "--valid-data-path": valid_data_path,
        "--test-data-path": test_data_path,
    }
    given = [flag for flag, paths in own_paths.items() if paths]
    if data_path and given:
        raise ConfigurationError(
            f"--data-path and {given[0]} exclude each other: --data-path is cut by --split, the "
            "others are read whole. Leave one of them out"
        )
    if data_path:
        shared = parse_blend("--data-path", data_path)
        return DataSources(shared=shared, split=_checked_split(split), per_split=(None,) * 3)
    if not train_data_path:
        raise ConfigurationError(
            "no training data: give --data-path PREFIX, or --train-data-path PREFIX (made by "
            "tools/preprocess_data.py)"
        )
    if split is not None:
        raise ConfigurationError(
            f"--split {split}: cuts --data-path only; with --train-data-path omit it"
        )
    train, valid, test = (
        parse_blend(flag, paths) if paths else None for flag, paths in own_paths.items()
    )
    return DataSources(shared=None, split=None, per_split=(train, valid, test))


def parse_blend(flag: str, values: Sequence[str]) -> Blend:
    """`["a", "b"]` or `["0.3", "a", "0.7", "b"]`, as Megatron reads them.

    Raises:
        ConfigurationError: a weight without a dataset, one that is not positive, or a dataset named
            twice.
    """
    blend = _parsed_blend(flag, values)
    if (repeated := named_twice(blend.prefixes)) is not None:
        # They are shuffled alike, so that a sample's copies come close together.
        raise ConfigurationError(
            f"{flag}: {repeated} is there more than once, so that each of its samples would be "
            "read as often. Give each dataset once; weights say how much is read of it"
        )
    return blend


def _parsed_blend(flag: str, values: Sequence[str]) -> Blend:
    heads = [_as_weight(value) for value in values[::2]]
    if len(values) % 2 or not any(weight is not None for weight in heads):
        if any(_as_weight(value) is not None for value in values):
            raise ConfigurationError(
                f"{flag} {' '.join(values)}: a weight before each dataset or before none, as in "
                f"{flag} 0.3 first 0.7 second"
            )
        return Blend(flag=flag, prefixes=[value.strip() for value in values], weights=None)
    prefixes = [value.strip() for value in values[1::2]]
    weights = []
    for weight, prefix in zip(heads, prefixes, strict=True):
        if weight is None or _as_weight(prefix) is not None:
            raise ConfigurationError(
                f"{flag} {' '.join(values)}: a weight before each dataset or before none, as in "
                f"{flag} 0.3 first 0.7 second"
            )
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigurationError(
                f"{flag}: the weight of {prefix} is {weight:g}, but must be above 0; leave out "
                "datasets that are not to be read"
            )
        weights.append(weight)
    if len(prefixes) == 1:
        return Blend(flag=flag, prefixes=prefixes, weights=None)
    return Blend(flag=flag, prefixes=prefixes, weights=weights)


def _as_weight(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _checked_split(split: str | None) -> str:
    """As megatron-core reads it."""
    if split is None:
        raise ConfigurationError("--data-path needs --split, such as --split 969,30,1")
    parts = [part.strip() for part in split.split(",")]
    shares = [_as_weight(part) for part in parts]
    sound = [s for s in shares if s is not None and math.isfinite(s) and s >= 0]
    if len(sound) != len(parts) or len(parts) > len(SPLIT_NAMES) or sum(sound) <= 0:
        raise ConfigurationError(
            f"--split {split}: up to three numbers, none negative and not all 0, for training, "
            "validation and test, such as --split 969,30,1"
        )
    plain = [_plain_number(part) for part in parts]
    return split if plain == parts else ", ".join(plain)


def _plain_number(text: str) -> str:
    """megatron-core takes every run of digits and points for a number of its own, so that 1e2 would
    be 1 and 2."""
    return text if re.fullmatch(r"[.0-9]+", text) else f"{Decimal(repr(float(text))):f}"
