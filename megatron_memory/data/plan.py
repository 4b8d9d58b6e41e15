"""How many samples each split gives and how many a run needs, before anything is built."""

import dataclasses
import math

import numpy as np

from megatron_memory.data.blend import SPLIT_NAMES, Blend, DataSources
from megatron_memory.data.index_files import IndexSummary
from megatron_memory.exceptions import DataError

_LONG_NAMES = {"train": "training", "valid": "validation", "test": "test"}
_FEWER_SAMPLES = {
    "train": "lower --train-iters or --global-batch-size",
    "valid": "lower --eval-iters (0: no evaluation) or raise --eval-interval",
    "test": "lower --eval-iters, or give the test split nothing",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """One split of a run."""

    name: str
    """train, valid or test."""
    num_samples: int
    """Samples that the run needs."""
    samples_per_epoch: dict[str, int] | None
    """For each dataset the samples of one pass over its part; None: the split has no data."""

    def __str__(self) -> str:
        if self.samples_per_epoch is None:
            return f"{_LONG_NAMES[self.name]}: no data"
        available = sum(self.samples_per_epoch.values())
        return (
            f"{_LONG_NAMES[self.name]}: {self.num_samples:,} samples, {available:,} in one pass "
            f"over the data ({self.num_samples / available:.2f} passes)"
        )


def plan_splits(
    sources: DataSources,
    summaries: dict[str, IndexSummary],
    *,
    seq_length: int,
    num_samples: tuple[int, int, int],
) -> list[SplitPlan]:
    """Count what every split gives.

    A split given no share, or no dataset of its own, has no data; training must have some.

    Args:
        sources: what the run reads.
        summaries: of every dataset in `sources`.
        seq_length: tokens of a sample.
        num_samples: needed for train, valid, test; 0 where a split is not read.

    Raises:
        DataError: a split gives too few samples; says how many it gives and how many are needed.
    """
    plans = []
    for i, name in enumerate(SPLIT_NAMES):
        blend, part, needed = sources.blend_of(i), sources.ranges()[i], num_samples[i]
        counts = None
        if needed and blend is not None and part is not None:
            counts = {
                prefix: _samples_in(blend, part, summaries[prefix], seq_length, name, needed)
                for prefix in blend.prefixes
            }
            _check_enough(blend, counts, name, needed)
        elif needed and name == "train":
            raise DataError(
                f"--split {sources.split}: gives training nothing, but {needed} samples are "
                "needed. Give its first number a share"
            )
        plans.append(SplitPlan(name=name, num_samples=needed, samples_per_epoch=counts))
    return plans


def _samples_in(
    blend: Blend,
    part: tuple[float, float],
    summary: IndexSummary,
    seq_length: int,
    name: str,
    needed: int,
) -> int:
    # As megatron-core cuts a dataset.
    begin, end = (round(bound * float(summary.num_sequences)) for bound in part)
    num_tokens = int(np.sum(summary.sequence_lengths[begin:end], dtype=np.int64))
    # A sample is one token longer: labels are the tokens moved by one.
    samples = max(0, (num_tokens - 1) // seq_length)
    # With none megatron-core repeats the part for ever, looking for a whole sample.
    if samples == 0:
        share = (
            f"its {_LONG_NAMES[name]} part ({end - begin} of {summary.num_sequences} documents)"
            if part != (0.0, 1.0)
            else "it"
        )
        raise DataError(
            f"{blend.flag} {summary.prefix}: {share} holds {num_tokens} tokens, which give 0 "
            f"samples of --seq-length {seq_length}, but {needed} samples are needed. Use more "
            f"data, give this part a larger share in --split, lower --seq-length, or "
            f"{_FEWER_SAMPLES[name]}"
        )
    return samples


def _check_enough(blend: Blend, counts: dict[str, int], name: str, needed: int) -> None:
    """Several datasets without weights are read once through; everything else repeats."""
    available = sum(counts[prefix] for prefix in blend.prefixes)
    if len(blend.prefixes) > 1 and blend.weights is None and available < needed:
        weighted = " ".join(f"{counts[prefix]} {prefix}" for prefix in blend.prefixes)
        raise DataError(
            f"{blend.flag}: the {_LONG_NAMES[name]} split gives {available} samples, but {needed} "
            f"are needed, and datasets without weights are read only once. Give weights "
            f"({blend.flag} {weighted}) to read them repeatedly, use more data, or "
            f"{_FEWER_SAMPLES[name]} ({math.ceil(needed / available)} passes would be needed)"
        )
