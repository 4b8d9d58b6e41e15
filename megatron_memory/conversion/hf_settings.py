"""Every entry of a config.json is accounted for: read, known to change nothing, or refused by name.

transformers ignores entries that its class does not know, so that a setting of a newer version, or
of another family, could be lost without a word.
"""

from collections.abc import Mapping
from typing import Any

from megatron_memory.conversion.generation_settings import IN_CONFIG
from megatron_memory.exceptions import CheckpointError

_READ = {
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "qk_norm",
    "qkv_bias",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
}
# What they say is of the file, of a training or of a caller, not of the model's computation.
_WITHOUT_EFFECT = {
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    *IN_CONFIG,
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_settings(values: Mapping[str, Any], own: frozenset[str] = frozenset()) -> list[str]:
    """Refuse what could change the computation and is not read.

    Args:
        values: what config.json says, without defaults.
        own: further entries that the family's reader reads.

    Returns:
        what to tell the user.

    Raises:
        CheckpointError: names the entries.
    """
    unknown = {
        name: value
        for name, value in values.items()
        if name not in _READ | _WITHOUT_EFFECT | own and not name.startswith("_") and value
    }
    if unknown:
        listed = ", ".join(f"{name} {_shown(value)}" for name, value in sorted(unknown.items()))
        raise CheckpointError(
            f"{listed}: nothing is known of such settings here, and they may change what the "
            "model computes. If they do not, remove them from config.json"
        )
    kinds = values.get("layer_types") or ()
    others = sorted({str(kind) for kind in kinds} - _LAYER_TYPES)
    if others:
        raise CheckpointError(
            f"layer_types {', '.join(others)}: only full_attention is built here, and "
            "sliding_attention up to its window"
        )
    _check_rope(values)
    return list(_notes(values))


def _check_rope(values: Mapping[str, Any]) -> None:
    """transformers 5 reads rope_parameters, 4 rope_theta and rope_scaling: two models of one
    folder, where they differ."""
    both = values.get("rope_parameters") or {}
    if not isinstance(both, Mapping):
        return
    older = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
    differing = [
        f"{name} {_shown(value)} and {_shown(both[name])}"
        for name, value in older.items()
        if value is not None and name in both and both[name] != value
    ]
    if differing:
        raise CheckpointError(
            f"{', '.join(differing)}: rope_parameters says the second, which transformers 5 takes, "
            "and 4 the first. Remove the one that is not meant"
        )


def _notes(values: Mapping[str, Any]) -> list[str]:
    notes = []
    if values.get("attention_dropout"):
        notes.append(
            f"attention_dropout {values['attention_dropout']} is of a training, and is not kept: "
            "give --attention-dropout to train with it"
        )
    if values.get("auto_map") and values.get("model_type") != "memory_llama":
        notes.append(
            f"auto_map: the folder's own code is not run; the model is converted as transformers' "
            f"own {values.get('model_type')}"
        )
    return notes


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
