"""Tiny models with random weights as a training saves them, and their texts without a cache."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_memory.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PrecisionConfig,
    TrainingConfig,
)
from megatron_memory.data.tokenizers import padded_vocab_size
from megatron_memory.inference.generator import Generator, load_generator
from megatron_memory.inference.options import ModelSource
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training.checkpoint.saver import CheckpointSaver
from megatron_memory.training.checkpoint.state import Position
from megatron_memory.training.setup import build_training_setup
from megatron_memory.training.wrapping import unwrap

VOCAB = 60
"""Of NullTokenizer: a prompt is its token numbers. The embedding is padded to 128 rows a rank."""
END = VOCAB - 1
POSITIONS = 48
PROMPTS = ("3 1 4 1 5 9 2 6", "27", "18 28 18 28 45", "1 1 2 3 5 8 13 21 34 55 11")
"""Of different lengths, odd and even."""
NUM_TOKENS = 12

VARIANTS: dict[str, dict[str, Any]] = {
    "memory+": {"layers": "1,2", "variant": "memory+", "qk_norm": True},
    "pkm": {"layers": "1", "variant": "pkm", "value_dim": 48, "gated": True},
    "peer": {"layers": "1", "variant": "peer", "share_scope": "layer"},
    "dense": {},
    "experts": {},
}


def tiny_config(save: Path, variant: str = "memory+", **changes: dict[str, Any]) -> Config:
    """Three layers; weights large enough that a token depends on all before it.

    `changes`: fields by component (model, parallel, precision, data).
    """
    memory = VARIANTS[variant]
    experts = {"num_experts": 4, "moe_layer_freq": 2} if variant == "experts" else {}
    sizes = dict(num_heads=2, top_k=4, num_half_keys=8, num_random_values=2) if memory else {}
    return Config(
        model=ModelConfig(
            **dict(
                num_layers=3,
                hidden_size=32,
                num_attention_heads=4,
                num_query_groups=2,
                seq_length=POSITIONS,
                position_embedding_type="rope",
                normalization="RMSNorm",
                swiglu=True,
                disable_bias_linear=True,
                untie_embeddings_and_output_weights=True,
                init_method_std=0.3,
            )
            | experts
            | changes.get("model", {})
        ),
        memory=MemoryConfig(**sizes, **memory),
        parallel=ParallelConfig(**changes.get("parallel", {})),
        precision=PrecisionConfig(**changes.get("precision", {})),
        optimizer=OptimizerSettings(lr=1e-3),
        training=TrainingConfig(micro_batch_size=2, global_batch_size=2, train_iters=1),
        checkpoint=CheckpointConfig(save=str(save), no_save_optim=True),
        data=DataConfig(**dict(vocab_size=VOCAB) | changes.get("data", {})),
    )


def save_model(config: Config, iterations: Sequence[int] = (5,)) -> list[tuple[int, ...]] | None:
    """Save a model, as a training with this configuration would; a collective call.

    Returns:
        what the training's own model says after PROMPTS, which it reads on one rank only.
    """
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    data, ranks = config.data, config.parallel.tensor_model_parallel_size
    assert data.vocab_size is not None, "the models here have no tokenizer of their own"
    padded = padded_vocab_size(data.vocab_size, data.make_vocab_size_divisible_by, ranks)
    setup = build_training_setup(config, backend, padded)
    with torch.no_grad():
        for parameter in setup.model[0].parameters():
            # Else a model that nothing was loaded into would be the same one.
            parameter.mul_(1.25)
    saver = CheckpointSaver(setup, data.vocab_size)
    for iteration in iterations:
        saver.save(Position(iteration=iteration))
    model = unwrap(setup.model[0]).eval()
    texts = None
    if ranks == 1 and not config.precision.bf16:
        texts = [greedy_without_cache(model, tokens_of(prompt)) for prompt in PROMPTS]
    parallel_state.destroy_model_parallel()
    return texts


def observe(save: Path, ranks: int, functions: Sequence[Callable[[Generator], Any]]) -> list[Any]:
    """What each function makes of the newest model in a directory; a collective call."""
    generator = load(save, ranks)
    return [function(generator) for function in functions]


def save_and_observe(
    config: Config, functions: Sequence[Callable[[Generator], Any]]
) -> tuple[list[tuple[int, ...]] | None, list[Any]]:
    """`save_model` and `observe` on the same ranks."""
    texts = save_model(config)
    ranks = config.parallel.tensor_model_parallel_size
    return texts, observe(Path(str(config.checkpoint.save)), ranks, functions)


def tokens_of(prompt: str) -> list[int]:
    """NullTokenizer's."""
    return [int(number) for number in prompt.split()]


def load(save: Path, tensor_parallel_size: int = 1, **fields: Any) -> Generator:
    """The newest model in a directory."""
    source = ModelSource(
        load=str(save), tensor_model_parallel_size=tensor_parallel_size, device="cpu", **fields
    )
    return load_generator(source, select_backend("cpu"))


@torch.inference_mode()
def logits_without_cache(
    model: torch.nn.Module, tokens: list[int], vocab_size: int = VOCAB
) -> torch.Tensor:
    """[tokens, vocab_size]: one forward pass over the whole sequence, as in training."""
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    logits = model(ids, positions, None, runtime_gather_output=True)
    return logits[0, :, :vocab_size].float()


def greedy_without_cache(
    model: torch.nn.Module, prompt: list[int], num_tokens: int = NUM_TOKENS
) -> tuple[int, ...]:
    """The likeliest token again and again, each by a forward pass over all before it."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(logits_without_cache(model, tokens)[-1].argmax()))
        if tokens[-1] == END:
            return tuple(tokens[len(prompt) : -1])
    return tuple(tokens[len(prompt) :])
