"""Copies of a Hugging Face tokenizer that give the ids of the original, wherever they are read.

What `AutoTokenizer` makes of a folder depends on more than tokenizer.json: on `tokenizer_class`, on
the `model_type` of a config.json beside it, and on the version of transformers. transformers 5
builds the classes of some families (LlamaTokenizer, Qwen2Tokenizer) by rules of their own and takes
only the vocabulary from the file, transformers 4 takes all of it. So:

1. The original is loaded as a training loads it, and its definition is what counts.
2. Files are copied as they are where every version reads that definition from them.
3. Else the definition itself is written as tokenizer.json, with the one class that takes all of it
   in every version, PreTrainedTokenizerFast. For a model of type qwen2 transformers 5 ignores the
   class, unless `auto_map` names one.
4. The copy is loaded and compared with the original: `tokenizer_check`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron_memory.hf_model
from megatron_memory.conversion.links import check_is_inside, files_of
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import read_json
from megatron_memory.reading.tokenizer_files import check_tokenizer_files

SETTINGS = "tokenizer_config.json"
DEFINITION = "tokenizer.json"
AS_TRAINED = "tokenization_as_trained.py"

_FILES = (
    DEFINITION,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_MORE_TEMPLATES = "additional_chat_templates"
_PLAIN_CLASS = "PreTrainedTokenizerFast"
_CLASS_REFERENCE = "tokenization_as_trained.TokenizerAsTrained"
# Settings of classes that build a tokenizer, or that versions understand differently; what they
# say is in the definition, or among the special tokens, that are written.
_OF_CLASSES = (
    "auto_map",
    "add_bos_token",
    "add_eos_token",
    "added_tokens_decoder",
    "additional_special_tokens",
    "backend",
    "extra_special_tokens",
    "is_local",
    "legacy",
    "local_files_only",
    "name_or_path",
    "sp_model_kwargs",
    "special_tokens_map_file",
    "tokenizer_file",
    "use_default_system_prompt",
    "vocab_file",
)
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# The parts of Qwen2's own tokenizers that transformers 5 puts in the place of the file's.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = ("qwen2", "qwen3")
_FORCED = ("qwen2",)
"""Types of models whose tokenizers transformers 5 builds by its own class, whatever is declared."""


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer in a folder, which may hold a model as well.

    Raises:
        CheckpointError: one is a link to somewhere outside of the folder.
    """
    return files_of(folder, _FILES)


def load_tokenizer(folder: Path) -> Any:
    """What transformers makes of a folder, as a training and a user do; none of its code is run.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        check_tokenizer_files(folder)
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # transformers raises nearly anything on a damaged file, tokenizers a PanicException.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            raise
        raise CheckpointError(f"{folder}: the tokenizer cannot be read: {error}") from error


def copy_tokenizer(tokenizer: Path, folder: Path, model_type: str | None = None) -> None:
    """Copy a tokenizer's folder, or its one file, without anything that does not belong to it.

    Args:
        tokenizer: the folder or file of a training's tokenizer.
        folder: where to; made if need be.
        model_type: of the config.json beside the copy; None: there is none.

    Raises:
        CheckpointError: it cannot be read, or a link leads out of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.is_file():
        check_is_inside(tokenizer.parent, tokenizer)
        shutil.copyfile(tokenizer, folder / tokenizer.name)
        return
    original = load_tokenizer(tokenizer)
    settings = read_settings(tokenizer)
    files = tokenizer_files(tokenizer)
    _copy_more_templates(tokenizer, folder)
    if _reads_alike_everywhere(tokenizer, settings, original, model_type):
        for file in files:
            shutil.copyfile(file, folder / file.name)
        return
    _write_definition(original, settings, folder, model_type)
    for file in files:
        if file.suffix == ".jinja":
            shutil.copyfile(file, folder / file.name)


def _copy_more_templates(tokenizer: Path, folder: Path) -> None:
    """Chat templates beside the one by default, which transformers looks for in a folder."""
    files = sorted((tokenizer / _MORE_TEMPLATES).glob("*.jinja"))
    for file in filter(Path.is_file, files):
        check_is_inside(tokenizer, file)
        (folder / _MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, folder / _MORE_TEMPLATES / file.name)


def force_definition(folder: Path, settings: dict[str, Any], model_type: str | None) -> None:
    """Make transformers 5 keep to tokenizer.json where the model's type makes it do otherwise."""
    if model_type in _FORCED:
        settings["auto_map"] = {"AutoTokenizer": [_CLASS_REFERENCE, _CLASS_REFERENCE]}
        source = Path(megatron_memory.hf_model.__file__).parent / AS_TRAINED
        shutil.copyfile(source, folder / AS_TRAINED)


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; {} where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / SETTINGS
    return read_json(path, CheckpointError) if path.is_file() else {}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """tokenizer_config.json."""
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS).write_text(text, "utf-8")


def definition(tokenizer: Any) -> dict[str, Any] | None:
    """What a tokenizer does, by its parts; None of one that is a program instead.

    How a batch is padded and cut off belongs to a call, not to the tokenizer.
    """
    if not tokenizer.is_fast:
        return None
    return _normal_form(json.loads(tokenizer.backend_tokenizer.to_str()))


def _normal_form(parts: Mapping[str, Any]) -> dict[str, Any]:
    """One spelling for what means the same."""
    normal = {name: part for name, part in parts.items() if name not in ("truncation", "padding")}
    model = normal.get("model") or {}
    normal["model"] = {name: value for name, value in model.items() if value not in (None, "")}
    # transformers 5 writes a template that adds nothing where there was none.
    if not (normal.get("post_processor") or {}).get("special_tokens", True):
        normal["post_processor"] = None
    return normal


def _reads_alike_everywhere(
    folder: Path, settings: Mapping[str, Any], original: Any, model_type: str | None
) -> bool:
    """Whether each version of transformers makes the original of the files as they are."""
    made = definition(original)
    if made is None:
        return True
    path = folder / DEFINITION
    declared = str(settings.get("tokenizer_class"))
    plain = declared == _PLAIN_CLASS and model_type not in _FORCED
    own = _says_qwen2(declared) and _is_qwen2(made) and model_type in _QWEN
    if not path.is_file() or not (plain or own):
        return False
    if settings.keys() & {"auto_map", "add_bos_token", "add_eos_token"}:
        return False
    # transformers 4 takes a table here, and 5 writes a list.
    if isinstance(settings.get("extra_special_tokens"), list):
        return False
    if _prefix_space(made) not in (None, settings.get("add_prefix_space", False)):
        return False
    stored = _normal_form(read_json(path, CheckpointError))
    return all(stored.get(name) == part for name, part in made.items())


def _says_qwen2(declared: str) -> bool:
    return declared.removesuffix("Fast") == "Qwen2Tokenizer"


def _is_qwen2(made: Mapping[str, Any]) -> bool:
    splitting = made["pre_tokenizer"] or {}
    steps = splitting.get("pretokenizers", [])
    return (
        (made["normalizer"] or {}).get("type") == "NFC"
        and [step["type"] for step in steps] == ["Split", "ByteLevel"]
        and steps[0]["pattern"] == {"Regex": _QWEN2_SPLIT}
        and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        and not steps[1]["add_prefix_space"]
        and not steps[1]["use_regex"]
        and made["model"]["type"] == "BPE"
        and not made["model"].get("fuse_unk")
        and not made["model"].get("byte_fallback")
    )


def _prefix_space(made: Mapping[str, Any]) -> bool | None:
    """What transformers 4 overwrites by a setting of this name; None where there is none."""
    return (made["pre_tokenizer"] or {}).get("add_prefix_space")


def _write_definition(
    original: Any, settings: Mapping[str, Any], folder: Path, model_type: str | None
) -> None:
    kept = {name: value for name, value in settings.items() if name not in _OF_CLASSES}
    kept.pop("add_prefix_space", None)
    made = definition(original)
    assert made is not None, "programs are copied as they are"
    prefix_space = _prefix_space(made)
    if prefix_space is not None:
        kept["add_prefix_space"] = prefix_space
    for name in _SPECIAL:
        token = getattr(original, name, None)
        kept[name] = None if token is None else str(token)
    extra = _extra_tokens(original)
    if extra:
        kept["additional_special_tokens"] = extra
    kept |= {
        "tokenizer_class": _PLAIN_CLASS,
        "clean_up_tokenization_spaces": bool(original.clean_up_tokenization_spaces),
        "model_max_length": original.model_max_length,
        "padding_side": original.padding_side,
    }
    force_definition(folder, kept, model_type)
    text = json.dumps({**made, "truncation": None, "padding": None}, ensure_ascii=False, indent=2)
    (folder / DEFINITION).write_text(text + "\n", "utf-8")
    write_settings(folder, kept)


def _extra_tokens(original: Any) -> list[str]:
    """Special tokens without a role; transformers 5 gave them another name."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        tokens = getattr(original, name, None)
        if tokens:
            return [str(token) for token in tokens]
    return []
