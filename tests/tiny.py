"""A model small enough to build in a test, and the groups of a run of one process."""

import pytest
import torch

from megatron_memory.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import (
    initialize_distributed,
    seed_everything,
    shutdown_distributed,
)
from tests.devices import TEST_DEVICE

VOCAB, SEQUENCE = 64, 16


def tiny_config(variant: str | None, parallel: dict | None = None, **options) -> Config:
    """Four layers, two with memory; `memory`, `model` and `optimizer` change some settings."""
    memory = dict(num_heads=2, top_k=4, num_half_keys=8) | options.pop("memory", {})
    optimizer = dict(lr=1e-2, min_lr=1e-3, adam_eps=1e-4, lr_warmup_iters=1)
    optimizer |= options.pop("optimizer", {})
    model = dict(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        disable_bias_linear=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    model |= options.pop("model", {})
    return Config(
        model=ModelConfig(**model),
        memory=MemoryConfig(layers=variant and "1,3", variant=variant or "memory+", **memory),
        parallel=ParallelConfig(**(parallel or {})),
        optimizer=OptimizerSettings(**optimizer),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=8, train_iters=8),
        **options,
    )


def tiny_model(config: Config, seed: int = 1234):
    """The model of a configuration on this process; Megatron's groups must exist."""
    from megatron_memory.model.gpt import build_model

    seed_everything(seed)
    (model,) = build_model(config, select_backend(TEST_DEVICE), padded_vocab_size=VOCAB)
    return model


def tiny_batch(seed: int = 5, num_sequences: int = 2) -> dict[str, torch.Tensor]:
    """Keyword arguments of the model that make it return the losses [sequences, positions]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (num_sequences, SEQUENCE + 1), generator=generator)
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(SEQUENCE).expand(num_sequences, -1),
        "attention_mask": None,
        "labels": tokens[:, 1:].contiguous(),
    }


@pytest.fixture(scope="module")
def one_rank():
    """Megatron's groups of one process, for tests that build models in this one."""
    initialize_distributed(tiny_config(None), select_backend(TEST_DEVICE))
    yield
    shutdown_distributed()
