"""Runs of the training program on a tiny model and data, as functions that a test rank calls."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_memory.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
    check_config,
)
from megatron_memory.runtime import select_backend
from megatron_memory.training import program, trainer
from megatron_memory.training.step import StepResult
from tests.full_tensors import Pieces, local_weights, of_chunks

VOCAB, SEQUENCE, BATCH = 64, 16, 8


def write_dataset(folder: Path, num_documents: int = 60) -> str:
    """Documents of random tokens; returns the dataset's prefix."""
    prefix = str(folder / "tokens")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    generator = torch.Generator().manual_seed(3)
    for _ in range(num_documents):
        length = int(torch.randint(20, 60, (), generator=generator))
        # Half of the vocabulary: something for three steps to learn.
        document = torch.randint(0, VOCAB // 2, (length,), generator=generator)
        builder.add_document(document, [length])
    builder.finalize(prefix + ".idx")
    return prefix


def tiny_config(prefix: str, **changes: dict[str, Any] | str | None) -> Config:
    """Two layers, the second with a memory. `changes`: fields by component (model, memory ...)."""
    cache = os.path.join(os.path.dirname(prefix), "cache")
    settings: dict[str, tuple[type, dict[str, Any]]] = {
        "model": (
            ModelConfig,
            dict(
                num_layers=2,
                hidden_size=32,
                num_attention_heads=4,
                seq_length=SEQUENCE,
                position_embedding_type="rope",
                normalization="RMSNorm",
                swiglu=True,
                disable_bias_linear=True,
                attention_dropout=0.0,
                hidden_dropout=0.0,
            ),
        ),
        "memory": (MemoryConfig, dict(layers="1", num_heads=2, top_k=4, num_half_keys=8)),
        "parallel": (ParallelConfig, dict(device="cpu")),
        "optimizer": (OptimizerSettings, dict(lr=1e-2, lr_decay_iters=20, lr_warmup_iters=2)),
        "training": (
            TrainingConfig,
            dict(micro_batch_size=2, global_batch_size=BATCH, train_iters=20, eval_iters=0),
        ),
        "checkpoint": (CheckpointConfig, {}),
        "logging": (LoggingConfig, dict(log_interval=5)),
        "data": (
            DataConfig,
            dict(
                data_path=(prefix,),
                split="80,20,0",
                data_cache_path=cache,
                vocab_size=VOCAB,
                make_vocab_size_divisible_by=1,
                num_workers=0,
            ),
        ),
    }
    components = {
        name: component(**(defaults | changes.pop(name, {})))
        for name, (component, defaults) in settings.items()
    }
    return Config(**components, **changes)


def change(config: Config, component: str, **fields: Any) -> Config:
    """The configuration with some fields of one component changed."""
    changed = dataclasses.replace(getattr(config, component), **fields)
    return dataclasses.replace(config, **{component: changed})


@dataclasses.dataclass
class Run:
    """What one rank saw of a run."""

    exit_code: int
    losses: list[float]
    norms: list[tuple[float | None, float | None]]
    learning_rates: list[tuple[float, float | None]]
    iterations: list[int]
    weights: Pieces


def run(config: Config, on_step: trainer.OnStep | None = None) -> Run:
    """The whole program on this rank, as often as one likes in a process."""
    check_config(config, torch.distributed.get_world_size())
    seen: list[tuple[int, StepResult]] = []
    setups = []

    def record(iteration: int, result: StepResult) -> None:
        seen.append((iteration, result))
        if on_step is not None:
            on_step(iteration, result)

    build = program.build_training_setup
    program.build_training_setup = lambda *args: setups.append(build(*args)) or setups[-1]
    try:
        exit_code = program.run_training(config, select_backend("cpu"), record)
        with trainer.whole_weights(setups[-1]):
            weights = of_chunks(setups[-1].model, local_weights)
    finally:
        program.build_training_setup = build
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    return Run(
        exit_code=exit_code,
        losses=[result.loss for _, result in seen],
        norms=[(result.grad_norm, result.value_grad_norm) for _, result in seen],
        learning_rates=[(r.learning_rate, r.value_learning_rate) for _, r in seen],
        iterations=[iteration for iteration, _ in seen],
        weights=weights,
    )


def runs(configs: list[Config]) -> list[Run]:
    """Several runs, one after the other, in the same processes."""
    return [run(config) for config in configs]
