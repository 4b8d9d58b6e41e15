"""How evenly the memory layers read their slots, from the counts that a checkpoint holds."""

import dataclasses
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.inspection.contents import Contents
from megatron_memory.memory.usage import USAGE_PREFIX, usage_figures, usage_key
from megatron_memory.training.checkpoint.state import USAGE_SINCE

_LAYER = re.compile(re.escape(usage_key(0)).replace("0", r"(\d+)"))
_EDGES = (1 / 16, 1 / 4, 1, 4, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerUsage:
    """Of a layer's slots; each read counts with its weight."""

    num_slots: int
    num_never_read: int
    share_of_top_percent: float
    """Part of all reads that the most read hundredth of the slots has."""
    kl_to_uniform: float
    """In nats; 0 is perfectly even."""
    histogram: dict[str, float]
    """Part of the slots that are read so much as the mean slot, by ranges."""


def is_usage(name: str) -> bool:
    """Whether a tensor is a layer's counts."""
    return name.startswith(USAGE_PREFIX)


def slot_usage(tensors: Tensors) -> dict[str, LayerUsage]:
    """Of each layer that has counts, by its number.

    Raises:
        CheckpointError: the counts cannot be read.
    """
    found = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is not None and len(tensor.shape) == 1 and tensor.num_rows:
            found[match[1]] = layer_usage(tensor.read())
    return found


def layer_usage(sums: Tensor) -> LayerUsage:
    """Of a layer's sums [S]."""
    sums = sums.double()
    slots, total = sums.numel(), sums.sum()
    top = sums.topk(max(1, slots // 100)).values.sum()
    return LayerUsage(
        num_slots=slots,
        num_never_read=int((sums == 0).sum()),
        share_of_top_percent=(top / total).item() if total > 0 else 0.0,
        kl_to_uniform=usage_figures(sums).kl_to_uniform,
        histogram=_histogram(sums / sums.mean().clamp(min=1e-300)),
    )


def _histogram(of_mean: Tensor) -> dict[str, float]:
    edges = torch.tensor(_EDGES, dtype=of_mean.dtype)
    # A slot on an edge belongs to the range above it.
    places = torch.bucketize(of_mean, edges, right=True) + 1
    places[of_mean == 0] = 0
    counts = torch.bincount(places, minlength=len(_EDGES) + 2)
    shares = (counts / max(1, of_mean.numel())).tolist()
    return dict(zip(_names(), shares, strict=True))


def _names() -> Iterator[str]:
    words = [f"1/{round(1 / edge)}" if edge < 1 else f"{edge:g}" for edge in _EDGES]
    yield "never"
    yield f"below {words[0]}"
    yield from (f"{low} to {high}" for low, high in zip(words, words[1:], strict=False))
    yield f"{words[-1]} and more"


def describe_usage(contents: Contents, found: dict[str, LayerUsage]) -> Iterator[str]:
    """Lines for people."""
    if not found:
        return
    yield ""
    yield f"slots read{_since(contents)}, each read with its weight"
    for layer, usage in found.items():
        never = usage.num_never_read / usage.num_slots
        yield (
            f"  layer {layer}: {usage.num_never_read:,} of {usage.num_slots:,} slots never read "
            f"({never:.1%}); the top 1% have {usage.share_of_top_percent:.1%} of the reads; KL to "
            f"uniform {usage.kl_to_uniform:.3f}"
        )
        parts = [f"{name}: {share:.1%}" for name, share in usage.histogram.items() if share]
        yield f"    slots by their reads, the mean being 1: {', '.join(parts)}"


def _since(contents: Contents) -> str:
    since = contents.common.get(USAGE_SINCE)
    if since is None:
        return ""
    return " since the training began" if since == 0 else f" after {since:,} samples"
