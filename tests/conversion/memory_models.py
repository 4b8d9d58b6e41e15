"""Tiny memory models of every kind that can be exported, as states of a conversion."""

import dataclasses
from pathlib import Path

import torch

from megatron_memory.config import Config
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.model.gpt import build_model
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import seed_everything
from tests.devices import TEST_DEVICE
from tests.full_tensors import assemble, local_weights
from tests.tiny import tiny_config

TOKENIZER = Path(__file__).parents[2] / "examples" / "data" / "tokenizer"
VOCAB = 4096
"""Of that tokenizer."""

_ALL_OF_MEMORY_PLUS = {
    "value_dim": 48,
    "key_dim": 20,
    "qk_norm": True,
    "softmax_sink": True,
    "gated": True,
    "share_scope": "layer",
    "num_random_values": 2,
    "query_dropout": 0.1,
    "value_dropout": 0.2,
}
CASES: dict[str, tuple[str, dict]] = {
    "pkm": ("pkm", {"model": {"untie_embeddings_and_output_weights": True}}),
    "pkm-projected": ("pkm", {"memory": {"value_dim": 24, "gated": True}}),
    "memory+": ("memory+", {}),
    "memory+-with-all": ("memory+", {"memory": _ALL_OF_MEMORY_PLUS}),
    "peer": ("peer", {}),
    "beside": ("memory+", {"memory": {"beside_mlp": True, "value_dim": 24}}),
    "peer-beside": ("peer", {"memory": {"beside_mlp": True}}),
    "peer-in-groups": ("peer", {"memory": {"share_scope": "stage", "share_groups": "1;3"}}),
    "like-qwen2": ("memory+", {"model": {"num_query_groups": 2, "add_qkv_bias": True}}),
    "like-qwen3": (
        "memory+",
        {"model": {"num_query_groups": 2, "kv_channels": 16, "qk_layernorm": True}},
    ),
    "biases": ("memory+", {"model": {"disable_bias_linear": False}}),
    # A head as wide as this has pairs that turn slowly enough to be scaled.
    "llama3-rope": (
        "memory+",
        {
            "model": {
                "use_rope_scaling": True,
                "rope_scaling_factor": 4.0,
                "rotary_base": 16000,
                "kv_channels": 32,
            }
        },
    ),
    "pairs": ("memory+", {"model": {"rotary_interleaved": True, "qk_layernorm": True}}),
}


def case_config(name: str) -> Config:
    """Its configuration."""
    variant, options = CASES[name]
    options = dict(options)
    model = options.pop("model", {})
    config = tiny_config(variant, **options)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def build_case(name: str):
    """(our model, its state); Megatron's groups must exist.

    Biases, norms and sinks begin as zeros or ones, which would hide a mistake: they are moved.
    """
    config = case_config(name)
    seed_everything(1234)
    (model,) = build_model(config, select_backend(TEST_DEVICE), padded_vocab_size=VOCAB)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
            elif "memory" not in parameter_name and ".router." not in parameter_name:
                # Initial weights of 0.02 leave attention nearly uniform, whatever the rotation.
                parameter *= 5
    weights = {n: from_memory(t) for n, t in assemble([local_weights(model)]).items()}
    tokenizer = TOKENIZER if config.model.untie_embeddings_and_output_weights else None
    return model.eval(), SavedState(
        config=config, vocab_size=VOCAB, weights=weights, tokenizer=tokenizer
    )
