"""Hugging Face's Llama-like families: config.json to our model's configuration, and back.

Both directions write the settings down that differ between the families; what a family cannot say
is refused, never dropped.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from megatron_memory.config import ModelConfig
from megatron_memory.conversion.decoder import DecoderNames
from megatron_memory.exceptions import CheckpointError

# Megatron-core's frequencies for long contexts are Llama 3's, with these numbers written into them.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

NAMES = DecoderNames(
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    output="lm_head.weight",
    layer="model.layers.{}.",
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    projection="self_attn.o_proj",
    attention_norm="input_layernorm.weight",
    mlp_norm="post_attention_layernorm.weight",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    query_norm="self_attn.q_norm.weight",
    key_norm="self_attn.k_norm.weight",
    rotates_pairs=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models in transformers."""

    model_type: str
    """Its name in config.json."""
    architecture: str
    """Its class for language models."""
    biases: Callable[[Mapping[str, Any]], str]
    """Which linear layers have a bias, of its configuration: "none", "qkv" or "all"."""
    windows_by_layer: bool = False
    """Whether its class heeds `layer_types` and `use_sliding_window`; others ignore them, whatever
    a file says."""
    qk_norm: bool = False
    """Whether attention norms each head's queries and keys."""
    own_values: Callable[[ModelConfig], dict[str, Any]] = lambda model: {}
    """Settings that only this family has, of our configuration."""


def _llama_biases(values: Mapping[str, Any]) -> str:
    attention, mlp = bool(values["attention_bias"]), bool(values["mlp_bias"])
    if attention != mlp:
        raise CheckpointError(
            f"attention_bias {attention} and mlp_bias {mlp}: biases are in all linear layers here, "
            "or in none"
        )
    return "all" if attention else "none"


def _qwen3_biases(values: Mapping[str, Any]) -> str:
    if values["attention_bias"]:
        raise CheckpointError("attention_bias true: Qwen3 with biases in attention is not built")
    return "none"


def _llama_values(model: ModelConfig) -> dict[str, Any]:
    has_bias = not model.disable_bias_linear
    return {"attention_bias": has_bias, "mlp_bias": has_bias, "head_dim": model.kv_channels}


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            biases=_llama_biases,
            own_values=_llama_values,
        ),
        Family(
            model_type="mistral",
            architecture="MistralForCausalLM",
            biases=lambda values: "none",
            own_values=lambda model: {"head_dim": model.kv_channels, "sliding_window": None},
        ),
        Family(
            model_type="qwen2",
            architecture="Qwen2ForCausalLM",
            biases=lambda values: "qkv",
            windows_by_layer=True,
            own_values=lambda model: {"use_sliding_window": False},
        ),
        Family(
            model_type="qwen3",
            architecture="Qwen3ForCausalLM",
            biases=_qwen3_biases,
            windows_by_layer=True,
            qk_norm=True,
            own_values=lambda model: {
                "attention_bias": False,
                "head_dim": model.kv_channels,
                "use_sliding_window": False,
            },
        ),
    )
}


def family_for(model: ModelConfig) -> Family:
    """The family whose models are like ours; Llama where several are."""
    if model.qk_layernorm:
        return FAMILIES["qwen3"]
    return FAMILIES["qwen2" if _biases_of(model) == "qkv" else "llama"]


def check_family(family: Family, model: ModelConfig) -> None:
    """That a family has models like ours.

    Raises:
        CheckpointError: names the difference.
    """
    values = family.own_values(model)
    has, wants = (
        _biases_of(model),
        family.biases({"attention_bias": False, "mlp_bias": False} | values),
    )
    usual = model.hidden_size // model.num_attention_heads
    problems = {
        f"biases in {has} linear layers, not in {wants}": has != wants,
        "norms of the attention's queries and keys"
        if model.qk_layernorm
        else ("no norms of the attention's queries and keys"): model.qk_layernorm != family.qk_norm,
        f"heads of {model.kv_channels} channels, not {usual}": (
            "head_dim" not in values and model.kv_channels != usual
        ),
    }
    found = [text for text, is_so in problems.items() if is_so]
    if found:
        raise CheckpointError(
            f"--hf-model-type {family.model_type}: the model has {' and '.join(found)}. Choose "
            f"{family_for(model).model_type}, or leave the flag out"
        )


def _biases_of(model: ModelConfig) -> str:
    if not model.disable_bias_linear:
        return "all"
    return "qkv" if model.add_qkv_bias else "none"


def model_of(family: Family, values: Mapping[str, Any]) -> tuple[ModelConfig, list[str]]:
    """Our configuration of a model, and what to tell the user.

    Args:
        family: of the model.
        values: its configuration, the family's defaults filled in.

    Raises:
        CheckpointError: a setting has no equal here.
    """
    if values["hidden_act"] != "silu":
        raise CheckpointError(f"hidden_act {values['hidden_act']}: only silu is built here")
    biases = family.biases(values)
    heads = values["num_attention_heads"]
    positions, notes = _positions(values, family.windows_by_layer)
    model = ModelConfig(
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=values.get("num_key_value_heads") or heads,
        kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
        seq_length=positions,
        max_position_embeddings=positions,
        position_embedding_type="rope",
        **_rope(values),
        normalization="RMSNorm",
        norm_epsilon=values["rms_norm_eps"],
        swiglu=True,
        disable_bias_linear=biases != "all",
        add_qkv_bias=biases == "qkv",
        qk_layernorm=family.qk_norm,
        untie_embeddings_and_output_weights=not values["tie_word_embeddings"],
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return model, notes


def _positions(values: Mapping[str, Any], by_layer: bool) -> tuple[int, list[str]]:
    """Positions up to which attention over a window is attention over everything."""
    positions, window = values["max_position_embeddings"], values.get("sliding_window")
    kinds = values.get("layer_types") or ["sliding_attention"]
    slides = not by_layer or (
        values.get("use_sliding_window", True) and "sliding_attention" in kinds
    )
    if not slides or not window or window >= positions:
        return positions, []
    note = (
        f"sliding_window {window}: attention over a window is not built here, so that the model is "
        f"limited to --max-position-embeddings {window}, where it computes the same"
    )
    return window, [note]


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 has one entry for both, transformers 4 two, and the latter's wins.
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    by_layer_type = [name for name, value in rope.items() if isinstance(value, Mapping)]
    if by_layer_type:
        raise CheckpointError(
            f"rope_parameters for {' and '.join(by_layer_type)}: all layers rotate alike here"
        )
    base = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if int(base) != base:
        raise CheckpointError(f"rope_theta {base}: must be a whole number here")
    if any(of.get("partial_rotary_factor") not in (1, None) for of in (values, rope)):
        raise CheckpointError("partial_rotary_factor: only whole heads are rotated here")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}
    known |= {"factor", *LLAMA3_ROPE} if kind == "llama3" else set()
    unknown = [f"{name} {rope[name]}" for name in sorted(rope.keys() - known) if rope[name]]
    if kind in ("default", "llama3") and unknown:
        raise CheckpointError(
            f"rope_type {kind} with {', '.join(unknown)}: nothing is known of such settings here"
        )
    if kind == "default":
        return {"rotary_base": int(base)}
    numbers = {name: rope.get(name) for name in LLAMA3_ROPE}
    if kind != "llama3" or numbers != LLAMA3_ROPE:
        raise CheckpointError(
            f"rope_type {kind} with {numbers}: only default and llama3 with {LLAMA3_ROPE} are "
            "built in megatron-core"
        )
    return {
        "rotary_base": int(base),
        "use_rope_scaling": True,
        "rope_scaling_factor": float(rope["factor"]),
    }


def values_of(family: Family, model: ModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    """A config.json, in the spelling that transformers 4 and 5 both read."""
    scaling = None
    if model.use_rope_scaling:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor} | LLAMA3_ROPE
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": float(model.rotary_base),
        "rope_scaling": scaling,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **family.own_values(model),
    }
