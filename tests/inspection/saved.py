"""A tiny model's checkpoint in every format."""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.conversion.hf import write_hf
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.lingua import write_lingua
from megatron_memory.conversion.megatron import Layout, write_megatron
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.memory.usage import usage_key
from megatron_memory.training.checkpoint.state import USAGE_SINCE
from tests.full_tensors import assemble, local_weights
from tests.tiny import VOCAB, tiny_config, tiny_model

VOCAB_SIZE = VOCAB - 3
"""Of which the embedding's other rows are padding."""


def tiny_state(variant: str | None = "memory+", **options) -> SavedState:
    """Random weights, moments with their squares; 7 iterations of 8 sequences of 16 tokens."""
    untied = {"untie_embeddings_and_output_weights": True}
    config: Config = tiny_config(variant, model=untied | options.pop("model", {}), **options)
    whole = assemble([local_weights(tiny_model(config))])
    weights = {
        name: tensor[:VOCAB_SIZE] if tensor.shape[0] == VOCAB and "layers" not in name else tensor
        for name, tensor in whole.items()
        if not name.startswith("memory.")
    }
    weights |= {name: tensor for name, tensor in whole.items() if name.startswith("memory.")}
    generator = torch.Generator().manual_seed(9)
    moments = {n: torch.randn(t.shape, generator=generator) for n, t in weights.items()}
    reads = torch.rand(2, config.memory.num_values, generator=generator, dtype=torch.float64)
    usage = dict(zip(map(usage_key, (1, 3)), reads, strict=True)) if variant else {}
    squares = {name: tensor.square() for name, tensor in moments.items()}
    return SavedState(
        config=config,
        vocab_size=VOCAB_SIZE,
        weights=_lazy(weights),
        moments={"exp_avg": _lazy(moments), "exp_avg_sq": _lazy(squares)},
        usage=_lazy(usage),
        iteration=7,
        consumed_samples=56,
        common={USAGE_SINCE: 8} if variant else {},
    )


def _lazy(tensors: dict[str, Tensor]) -> dict:
    return {name: from_memory(tensor) for name, tensor in tensors.items()}


def changed(state: SavedState, **weights: Tensor) -> SavedState:
    """With other weights; names with _ for each dot."""
    names = {name.replace(".", "_"): name for name in state.weights}
    new = {names[key]: tensor for key, tensor in weights.items()}
    return dataclasses.replace(state, weights=state.weights | _lazy(new))


def save(state: SavedState, format_name: str, folder: Path) -> Path:
    """Write a state; returns the folder."""
    folder.mkdir(parents=True)
    if format_name == "megatron":
        write_megatron(state, folder, folder, Layout())
    elif format_name == "lingua":
        write_lingua(state, folder)
    else:
        write_hf(state, folder)
    return folder
