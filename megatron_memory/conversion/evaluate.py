"""Logits in fp32 of a model in any format, on one process of the CPU."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_memory.config import Config, ParallelConfig, PrecisionConfig, RecomputeConfig
from megatron_memory.conversion.hf import load_for_evaluation
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.data.tokenizers import padded_vocab_size
from megatron_memory.exceptions import CheckpointError
from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.memory.routing import Route
from megatron_memory.model.full_weights import load_full_weights
from megatron_memory.model.gpt import MemoryGPTModel, build_model
from megatron_memory.runtime import Backend, select_backend
from megatron_memory.runtime.distributed import initialize_distributed, shutdown_distributed
from megatron_memory.training.checkpoint.architecture import saved_config
from megatron_memory.training.checkpoint.finding import locate, read_common
from megatron_memory.training.checkpoint.loader import load_weights

OnRoute = Callable[[int, Route], None]
"""Is told where a memory layer, counted from 0, reads."""


def state_logits(
    state: SavedState, dtype: torch.dtype, tokens: Tensor, on_route: OnRoute | None = None
) -> Tensor:
    """Of our model with a state's weights, rounded to `dtype`: [sequences, length, vocabulary]."""
    with _model_of(state.config, state.vocab_size) as (model, padded):
        weights = {
            name: (tensor.with_zero_rows(padded) if _is_padded(name) else tensor).to(dtype).read()
            for name, tensor in state.exact_weights.items()
        }
        load_full_weights(model, weights)
        if on_route is not None:
            _observe(model, on_route)
        return _logits(model, tokens, state.vocab_size)


def _observe(model: MemoryGPTModel, on_route: OnRoute) -> None:
    for layer in model.memory_layers():

        def hook(router, inputs, route: Route, layer: MemoryLayer = layer) -> None:
            on_route(layer.layer_number - 1, route)

        layer.router.register_forward_hook(hook)


def megatron_logits(load: Path, tokens: Tensor) -> Tensor:
    """Of a checkpoint, as a training loads it."""
    folder = locate(load)
    config = None if folder is None else saved_config(folder)
    if folder is None or config is None:
        raise CheckpointError(f"{load}: holds no checkpoint with its config.yaml")
    vocab_size = read_common(folder)["vocab_size"]
    with _model_of(config, vocab_size) as (model, _):
        load_weights([model], on_one_rank(config), vocab_size, folder)
        return _logits(model, tokens, vocab_size)


def hf_logits(load: Path, dtype: torch.dtype, tokens: Tensor) -> Tensor:
    """Of transformers' model, its weights rounded to `dtype`."""
    model = load_for_evaluation(load)
    with torch.inference_mode():
        # Not the whole model: its rotary frequencies are no weights, and stay exact.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
        return model(tokens).logits.float()


def _is_padded(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")


def on_one_rank(config: Config) -> Config:
    """The same model in fp32, of megatron-core's local layers, on one CPU process."""
    replace = dataclasses.replace
    return replace(
        config,
        model=replace(config.model, transformer_impl="local"),
        memory=replace(config.memory, parallel_size=1, kernels="torch", fp8_values=False),
        parallel=ParallelConfig(device="cpu"),
        precision=PrecisionConfig(),
        recompute=RecomputeConfig(),
    )


@contextlib.contextmanager
def _model_of(config: Config, vocab_size: int) -> Iterator[tuple[MemoryGPTModel, int]]:
    """An fp32 model on this process, and the rows of its embedding."""
    config = on_one_rank(config)
    padded = padded_vocab_size(vocab_size, config.data.make_vocab_size_divisible_by, 1)
    with one_process(config) as backend:
        (model,) = build_model(config, backend, padded)
        yield model.eval(), padded


@contextlib.contextmanager
def one_process(config: Config) -> Iterator[Backend]:
    """Megatron's groups of this process alone."""
    backend = select_backend("cpu")
    initialize_distributed(on_one_rank(config), backend)
    try:
        yield backend
    finally:
        shutdown_distributed()


@torch.inference_mode()
def _logits(model: MemoryGPTModel, tokens: Tensor, vocab_size: int) -> Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens, positions, None, runtime_gather_output=True)
    return logits[..., :vocab_size].float()
