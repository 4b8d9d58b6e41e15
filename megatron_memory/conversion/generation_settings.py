"""How a Hugging Face folder says that its model is to generate: generation_config.json, and in part
config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_memory.conversion.links import files_of
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import read_json
from megatron_memory.training.checkpoint.generation import GenerationSettings

FILE = "generation_config.json"
_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)
_OTHERS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "remove_invalid_values",
    "repetition_penalty",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
)
IN_CONFIG = (*_IDS, *_OTHERS)
"""What of it a config.json may say; older versions of transformers wrote all of it there."""
# Which version wrote the file is not a setting.
_OF_FILE = ("transformers_version", "_from_model_config")


def read_generation(folder: Path, config: Mapping[str, Any]) -> GenerationSettings:
    """What a model's folder says.

    Args:
        folder: of the model.
        config: what its config.json says, without defaults.

    Raises:
        CheckpointError: generation_config.json is damaged.
    """
    in_config = {name: config[name] for name in IN_CONFIG if name in config}
    if not files_of(folder, [FILE]):
        return GenerationSettings(in_config=in_config)
    values = read_json(folder / FILE, CheckpointError)
    in_file = {name: value for name, value in values.items() if name not in _OF_FILE}
    return GenerationSettings(in_config=in_config, in_file=in_file)


def check_same_generation(settings: GenerationSettings, folder: Path, config: Any) -> int:
    """Hold a folder that was written to what it was written from.

    Returns:
        the number of settings compared.

    Raises:
        CheckpointError: names those that differ.
    """
    found = read_generation(folder, config)
    pairs = [
        ("config.json", settings.in_config, found.in_config),
        (FILE, settings.in_file or {}, found.in_file or {}),
    ]
    for name, expected, there in pairs:
        differing = sorted(k for k in {*expected, *there} if expected.get(k) != there.get(k))
        if differing:
            raise CheckpointError(
                f"--verify: {folder / name} differs from what was converted in "
                f"{', '.join(differing)}"
            )
    return sum(len(expected) for _, expected, _ in pairs)
