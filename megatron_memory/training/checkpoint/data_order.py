"""Is the training data still read in the order in which it was read before a checkpoint?

`consumed_samples` counts from the start of a permutation. megatron-core shuffles all passes over a
dataset together, so that another number of passes is another permutation, as are another seed,
file, blend, split or length of samples. Whatever the cause: the samples that were used are other
ones then. So a checkpoint holds digests of some of them, and a run that goes on reads them again.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset

from megatron_memory.data.cached_datasets import TokenDataset
from megatron_memory.data.datasets import Samples

_NUM_PROBES = 64
"""Of all datasets together; at least one each."""
_WINDOW = 1_000_000
"""Samples of a blend in which its newest sample of each dataset is looked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """What was read of one dataset."""

    prefix: str
    fingerprint: str
    """Of its files."""
    num_passes: int
    """Over the dataset's part for training, for which the order was made."""
    num_used: int
    """Samples."""
    digest: str
    """Of some of these, tokens and all."""


def read_parts(dataset: Samples, consumed_samples: int) -> list[Part]:
    """What was used of each dataset behind `dataset`, the run's training data.

    Raises:
        DataError: a sample has tokens that the model does not have.
    """
    if consumed_samples == 0:
        return []
    if isinstance(dataset, TokenDataset):
        return [_part(dataset, consumed_samples, _NUM_PROBES)]
    assert isinstance(dataset, BlendedDataset), "the builder makes these two"
    first = max(0, consumed_samples - _WINDOW)
    ids = np.asarray(dataset.dataset_index[first:consumed_samples])
    numbers = np.asarray(dataset.dataset_sample_index[first:consumed_samples])
    num_probes = max(1, _NUM_PROBES // len(dataset.datasets))
    parts = []
    for i, each in enumerate(dataset.datasets):
        found = numbers[ids == i]
        parts.append(_part(each, int(found.max()) + 1 if found.size else 0, num_probes))
    return parts


def _part(dataset: TokenDataset, num_used: int, num_probes: int) -> Part:
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, num_used - 1, num_probes).round()) if num_used else ():
        tokens = dataset[int(number)]["tokens"]
        digest.update(tokens.numpy().astype("<i8").tobytes())
    prefix = dataset.dataset.path_prefix
    return Part(
        prefix=prefix,
        fingerprint=dataset.config.fingerprints[prefix],
        num_passes=len(dataset.document_index) // max(1, len(dataset.indices)),
        num_used=num_used,
        digest=digest.hexdigest(),
    )


def as_plain(parts: list[Part]) -> list[dict[str, Any]]:
    """For a checkpoint."""
    return [dataclasses.asdict(part) for part in parts]


def order_changes(saved: Any, parts: list[Part]) -> list[str]:
    """How the data or its order differs from a checkpoint's; [] where it is the same.

    Args:
        saved: what `as_plain` gave, read from a checkpoint.
        parts: of this run, after the checkpoint's number of samples.
    """
    try:
        before = [Part(**fields) for fields in saved]
    except TypeError:
        return ["the checkpoint's record of its data is damaged"]
    if len(before) != len(parts):
        return [f"{len(before)} datasets there, {len(parts)} here"]
    changes: list[str] = []
    for old, new in zip(before, parts, strict=True):
        changes += _changes_of_part(old, new)
    return changes


def _changes_of_part(old: Part, new: Part) -> list[str]:
    changes = []
    if old.fingerprint != new.fingerprint:
        where = new.prefix if old.prefix == new.prefix else f"{old.prefix} there, {new.prefix} here"
        changes.append(f"the files are other ones ({where})")
    if old.num_passes != new.num_passes:
        changes.append(
            f"{old.num_passes} {'pass' if old.num_passes == 1 else 'passes'} over {new.prefix} "
            f"there, {new.num_passes} here: --train-iters x --global-batch-size says how many, and "
            "all passes are shuffled together"
        )
    if old.num_used != new.num_used:
        changes.append(
            f"{old.num_used} samples of {new.prefix} were used there, and would have been "
            f"{new.num_used} here"
        )
    if not changes and old.digest != new.digest:
        changes.append(f"the samples of {new.prefix} come in another order")
    return changes
