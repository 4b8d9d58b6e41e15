"""Models in Hugging Face's format: a folder with config.json, weights and a tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_memory.config import (
    Config,
    DataConfig,
    MemoryConfig,
    OptimizerSettings,
    PrecisionConfig,
    TrainingConfig,
    check_values,
)
from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.problems import raise_problems
from megatron_memory.conversion.decoder import check_is_like_llama, check_size, decoder_rules
from megatron_memory.conversion.generation_settings import FILE as GENERATION
from megatron_memory.conversion.generation_settings import read_generation
from megatron_memory.conversion.hf_card import model_card
from megatron_memory.conversion.hf_families import (
    FAMILIES,
    NAMES,
    Family,
    check_family,
    family_for,
    model_of,
    values_of,
)
from megatron_memory.conversion.hf_memory import (
    MEMORY_SETTINGS,
    MODEL_TYPE,
    copy_code,
    cut_tables,
    join_tables,
    max_chunk_elements,
    memory_family,
    memory_of,
    memory_rules,
    memory_values,
    register,
)
from megatron_memory.conversion.hf_settings import check_settings
from megatron_memory.conversion.hf_stored import with_one_head, without_frequencies
from megatron_memory.conversion.hf_tokenizer import write_tokenizer
from megatron_memory.conversion.links import check_links
from megatron_memory.conversion.rules import Rule, to_ours, to_theirs
from megatron_memory.conversion.safetensors_files import (
    read_weight_files,
    unread_weights,
    write_weight_files,
)
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.conversion.shapes import check_shapes
from megatron_memory.conversion.tokenizer_files import tokenizer_files
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.reading.documents import read_json
from megatron_memory.training.checkpoint.generation import GenerationSettings

CONFIG = "config.json"
# Of all files that are read.
_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
# Settings whose defaults follow from others.
_FOLLOWING = (
    "head_dim",
    "num_key_value_heads",
    "layer_types",
    "rope_parameters",
    "memory_key_dim",
    "memory_value_dim",
)


def hf_rules(config: Config) -> list[Rule]:
    """The rules of a model.

    Raises:
        CheckpointError: no Llama-like model is the same.
    """
    check_is_like_llama(config, "hf")
    return list(decoder_rules(config, NAMES, memory_rules))


def read_hf(load: Path) -> SavedState:
    """A model's folder.

    Raises:
        CheckpointError: it is damaged, of an unknown family, or a setting has no equal here.
    """
    check_links(load, _SUFFIXES)
    values = read_config(load)
    generation = read_generation(load, values)
    family = _family_called(values, load)
    settings_notes = _checked_settings(values, load)
    values = _with_defaults(values)
    stored, is_tied, notes = with_one_head(read_weight_files(load), values)
    if unread := unread_weights(load):
        notes = [*notes, f"not read, as the weights are in other files: {', '.join(unread)}"]
    config, more = config_of(family, {**values, "tie_word_embeddings": is_tied}, stored, load)
    rules = hf_rules(config)
    stored = without_frequencies(stored, config.model, load)
    stored = join_tables(stored, config, load)
    weights = to_ours(rules, stored, load)
    vocab_size = values["vocab_size"]
    check_shapes(config, vocab_size, weights, load)
    return SavedState(
        config=config,
        vocab_size=vocab_size,
        weights=weights,
        tokenizer=load if tokenizer_files(load) else None,
        generation=generation,
        notes=(*settings_notes, *notes, *more),
    )


def _checked_settings(values: Mapping[str, Any], load: Path) -> list[str]:
    own = MEMORY_SETTINGS if values.get("model_type") == MODEL_TYPE else frozenset()
    try:
        return check_settings(values, own)
    except CheckpointError as error:
        raise CheckpointError(f"{load / CONFIG}: {error}") from error


def _family_called(values: Mapping[str, Any], load: Path) -> Family:
    model_type = str(values.get("model_type"))
    if model_type == MODEL_TYPE:
        return memory_family(bool(values.get("qk_norm")))
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{load / CONFIG}: model_type {model_type} is none of those that are read: "
            f"{', '.join([*FAMILIES, MODEL_TYPE])}"
        )
    return FAMILIES[model_type]


def read_hf_back(save: Path, config: Config) -> Tensors:
    """The weights that `write_hf` wrote, by the rules that they were written with.

    Raises:
        CheckpointError: something is missing, left over or damaged.
    """
    return to_ours(hf_rules(config), join_tables(read_weight_files(save), config, save), save)


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: holds no {CONFIG}: no Hugging Face model. Check the path, and --from"
        )
    return read_json(folder / CONFIG, CheckpointError)


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json leaves out is the default of transformers' own class, which knows it."""
    from transformers import CONFIG_MAPPING

    register()
    known = CONFIG_MAPPING[values["model_type"]]
    defaults = known().to_dict()
    # Its defaults for a few entries follow from others, of which those here are not the model's.
    for name in _FOLLOWING:
        defaults.pop(name, None)
        # Some families have a number of their own here (Mistral 8 groups, Qwen3 128 channels).
        if isinstance(own := getattr(known, name, None), int):
            defaults[name] = own
    return defaults | values


def config_of(
    family: Family, values: Mapping[str, Any], stored: Tensors, load: Path
) -> tuple[Config, list[str]]:
    """Our configuration of a model, and what to tell the user.

    Raises:
        CheckpointError: a setting is missing, or has no equal here.
    """
    try:
        model, notes = model_of(family, values)
        config = Config(
            model=model,
            memory=memory_of(values) if family.model_type == MODEL_TYPE else MemoryConfig(),
            precision=PrecisionConfig(bf16=_all_bf16(stored)),
            # Of its training nothing is known; a run's own flags say it.
            optimizer=OptimizerSettings(lr=0.0),
            training=TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=1),
            data=DataConfig(
                tokenizer_type="HuggingFaceTokenizer" if tokenizer_files(load) else None,
                vocab_size=values["vocab_size"],
            ),
        )
        check_values(config)
        check_size(config, stored)
        raise_problems(memory_problems(config))
    except (ConfigurationError, CheckpointError) as error:
        raise CheckpointError(f"{load / CONFIG}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{load / CONFIG}: does not describe a model ({error!r})") from error
    return config, notes


def _all_bf16(stored: Tensors) -> bool:
    return all(tensor.dtype == torch.bfloat16 for tensor in stored.values())


def write_hf(
    state: SavedState,
    folder: Path,
    *,
    model_type: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> list[str]:
    """Write a model's folder: configuration, weights, tokenizer; with memory, the model's code and
    a card as well.

    Args:
        state: what to write.
        folder: where to, empty.
        model_type: a family of FAMILIES; None: the one whose models are like this one.
        dtype: of the weights; None: as they are.
        max_shard_bytes: of a file.

    Returns:
        what to tell the user.

    Raises:
        CheckpointError, ConfigurationError: no such family, or it has no such model.
        OSError: the folder cannot be written.
    """
    rules = hf_rules(state.config)
    family = _family(state, model_type)
    weights = state.exact_weights if dtype == torch.float32 else state.weights
    named = to_theirs(rules, weights, "the model")
    tensors = {name: tensor.to(dtype or tensor.dtype, name) for name, tensor in named.items()}
    kind = dtype or next(iter(tensors.values())).dtype
    values = config_values(state, model_type, kind, max_shard_bytes)
    tokenizer = write_tokenizer(state, folder, family.model_type)
    generation = state.generation or GenerationSettings.of_tokens(tokenizer.special_tokens)
    if state.config.memory.enabled:
        tensors = cut_tables(tensors, max_shard_bytes)
        copy_code(folder)
        card = model_card(state, kind, has_tokenizer=tokenizer.is_there)
        (folder / "README.md").write_text(card, "utf-8")
    _write_json(folder / CONFIG, {**values, **generation.in_config})
    if generation.in_file is not None:
        _write_json(folder / GENERATION, generation.in_file)
    write_weight_files(folder, tensors, max_shard_bytes)
    return [] if tokenizer.note is None else [tokenizer.note]


def config_values(
    state: SavedState, model_type: str | None, dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, Any]:
    """What config.json says of a model, but for its generation settings.

    Raises:
        CheckpointError, ConfigurationError: no such family, or it has no such model.
    """
    config, kind = state.config, str(dtype).removeprefix("torch.")
    values = values_of(_family(state, model_type), config.model, state.vocab_size, kind)
    if config.memory.enabled:
        limit = max_chunk_elements(max_shard_bytes, dtype)
        values |= memory_values(config) | {"memory_max_chunk_elements": limit}
    return values


def load_for_evaluation(load: Path) -> torch.nn.Module:
    """transformers' own model of a folder, in fp32; no code that the folder holds is run.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    register()
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(load), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    # transformers raises nearly anything on a damaged file.
    except Exception as error:
        raise CheckpointError(f"{load}: transformers cannot read it: {error}") from error


def _family(state: SavedState, model_type: str | None) -> Family:
    if state.config.memory.enabled:
        if model_type not in (None, MODEL_TYPE):
            raise ConfigurationError(
                f"--hf-model-type {model_type}: the model has memory layers, which only "
                f"{MODEL_TYPE} has. Leave the flag out"
            )
        return memory_family(state.config.model.qk_layernorm)
    if model_type is None:
        return family_for(state.config.model)
    if model_type not in FAMILIES:
        raise ConfigurationError(
            f"--hf-model-type {model_type}: unknown. Choose one of {', '.join(FAMILIES)}"
        )
    check_family(FAMILIES[model_type], state.config.model)
    return FAMILIES[model_type]


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
