"""Small models for conversions, and comparisons of what comes out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.options import Checking, Conversion, Source, Target
from tests.golden_lingua import GOLDEN_MODELS

_SIZES: dict[str, Any] = dict(
    vocab_size=91,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
HF_MODELS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**_SIZES, head_dim=24),
    "llama-biases-tied": transformers.LlamaConfig(
        **_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    # Positions beyond 8192 make the scaling matter; the base turns slowly enough for it.
    "llama3": transformers.LlamaConfig(
        **_SIZES | {"max_position_embeddings": 16384}, rope_parameters=_LLAMA3
    ),
    "mistral": transformers.MistralConfig(
        **_SIZES | {"max_position_embeddings": 128}, sliding_window=50, head_dim=16
    ),
    "qwen2": transformers.Qwen2Config(
        **_SIZES, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)
    ),
    "qwen3": transformers.Qwen3Config(**_SIZES, head_dim=32, tie_word_embeddings=True),
}
"""A model of each family, the settings spread over them."""


def save_hf_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> torch.nn.Module:
    """transformers' own model with random weights, norms and biases included, saved by it."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(HF_MODELS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, **options)
    return model


def golden_checkpoint(name: str) -> Path:
    """A checkpoint of the public reference, sharded, after 24 steps."""
    return GOLDEN_MODELS / name / "0000000024"


def conversion(
    source: str, load: Path, target: str, save: Path, *, verify: bool | None = False, **options: Any
) -> Conversion:
    """What the tool makes of its command line."""
    return Conversion(
        source=Source(source_format=source, load=str(load)),
        target=Target(target_format=target, save=str(save), **options),
        checking=Checking(verify=verify),
    )


def read_all(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """All tensors, in memory."""
    return {name: tensor.read() for name, tensor in tensors.items()}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
