"""The manifest beside a `.bin`/`.idx` pair: where its tokens come from."""

from collections.abc import Callable
from typing import Any

from megatron_memory.exceptions import DataError
from megatron_memory.reading.documents import LARGEST_JSON, parse_json, read_bounded
from megatron_memory.reading.pickles import UnsafeFile, shown

FORMAT = 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_tokenizer(value: Any) -> bool:
    """What it says of a tokenizer, where it says it."""
    return isinstance(value, dict) and all(
        value.get(name) is None or holds(value[name]) for name, holds in _OF_TOKENIZER.items()
    )


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


_OF_TOKENIZER = {
    "type": _is_text,
    "model": _is_text,
    "vocab_size": _is_count,
    "eod": _is_count,
    "hash": _is_text,
}
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "format": (lambda value: type(value) is int and value == FORMAT, f"{FORMAT}"),
    "made_by": (_is_text, "a text"),
    "documents": (_is_count, "a whole number, 0 or more"),
    "sequences": (_is_count, "a whole number, 0 or more"),
    "tokens": (_is_count, "a whole number, 0 or more"),
    "dtype": (_is_text, "a text"),
    "tokenizer": (_is_tokenizer, f"an object of {', '.join(_OF_TOKENIZER)}"),
    "append_eod": (_is_flag, "true or false"),
    "include_special_tokens": (_is_flag, "true or false"),
    "json_key": (_is_text, "a text"),
    "skipped_lines": (_is_count, "a whole number, 0 or more"),
    "sources": (_is_list_of_objects, "a list of objects"),
    "merged_from": (_is_list_of_objects, "a list of objects"),
    "run": (_is_text, "a text"),
}


def manifest_path(prefix: str) -> str:
    """Where the manifest of a pair is."""
    return prefix + ".json"


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest of a pair; None where it has none, as pairs of other programs.

    Raises:
        DataError: it is damaged, or a value is of another kind.
    """
    path = manifest_path(prefix)
    try:
        manifest = parse_json(read_bounded(path, LARGEST_JSON))
    except FileNotFoundError:
        return None
    except (OSError, UnsafeFile) as error:
        raise DataError(
            f"{path}: the manifest cannot be read ({error}). Remove it, or preprocess again"
        ) from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: not a manifest. Remove it, or preprocess again")
    for name, (holds, expected) in _EXPECTED.items():
        if name in manifest and not holds(manifest[name]):
            raise DataError(
                f"{path}: not a manifest: {name} is {shown(manifest[name]):.80}, and must be "
                f"{expected}. Remove it, or preprocess again"
            )
    return manifest


def tokenizer_warning(prefix: str, tokenizer_hash: str) -> str | None:
    """What to say where a pair was made with another tokenizer than the one that is to read it.

    Args:
        prefix: of the pair.
        tokenizer_hash: of the reading tokenizer (`tokenizer_hash.hash_of`).
    """
    try:
        manifest = read_manifest(prefix)
    # A pair is as good without a manifest.
    except DataError as error:
        return f"warning: {error}"
    made_with = (manifest or {}).get("tokenizer", {})
    if made_with.get("hash") in (None, tokenizer_hash):
        return None
    return (
        f"warning: {prefix} was made with another tokenizer ({made_with.get('type')} "
        f"{made_with.get('model')}, {made_with.get('vocab_size')} entries) than this run's: its "
        "tokens mean something else. Preprocess it with this run's --tokenizer-model"
    )
