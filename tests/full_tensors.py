"""Whole weights or gradients of a model that is split over ranks, for comparisons."""

from collections.abc import Callable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, apply_factories
from torch import Tensor

from megatron_memory.model.full_weights import _flatten, _weight_shards
from megatron_memory.training.wrapping import unwrap

Pieces = dict[str, list[tuple[tuple, tuple, Tensor]]]
"""Name to (shape of the whole, where this part starts, the part), for each part on a rank."""


def local_weights(model) -> Pieces:
    """This rank's parts of the weights: name to [(whole shape, offset, part)]."""
    shards = _weight_shards(model)
    if any(isinstance(shard, ShardedTensorFactory) for shard in shards.values()):
        apply_factories(shards)
    pieces: Pieces = {}
    for shard in _flatten(shards):
        # Experts are stacked along leading dimensions that a single expert's tensor does not have.
        part = shard.data.detach().clone()[(None,) * shard.prepend_axis_num]
        entry = (tuple(shard.global_shape), tuple(shard.global_offset), part)
        pieces.setdefault(shard.key, []).append(entry)
    return pieces


def of_chunks(chunks, read: Callable[..., Pieces]) -> Pieces:
    """What `read` finds in all of a rank's chunks, in Megatron's wrappers or not."""
    pieces: Pieces = {}
    for chunk in chunks:
        for name, entries in read(unwrap(chunk)).items():
            pieces.setdefault(name, []).extend(entries)
    return pieces


@torch.no_grad()
def local_gradients(model) -> Pieces:
    """This rank's parts of DDP's `main_grad`, under the weights' names."""
    weights = {p: p.detach().clone() for p in model.parameters()}
    for parameter in weights:
        parameter.copy_(parameter.main_grad)
    pieces = local_weights(model)
    for parameter, weight in weights.items():
        parameter.copy_(weight)
    return pieces


def assemble(ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' parts; parts that several ranks hold must agree."""
    whole: dict[str, Tensor] = {}
    for pieces in ranks:
        for name, entries in pieces.items():
            for shape, offset, part in entries:
                tensor = whole.setdefault(name, torch.full(shape, float("nan")))
                view = tensor
                for dim, start in enumerate(offset):
                    view = view.narrow(dim, start, part.shape[dim])
                known = ~view.isnan()
                torch.testing.assert_close(
                    part.float()[known],
                    view[known],
                    rtol=0,
                    atol=0,
                    msg=lambda text, name=name: f"ranks disagree on {name}: {text}",
                )
                view.copy_(part)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: not all of it is on some rank"
    return whole
