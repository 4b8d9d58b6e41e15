"""The manifest beside a `.bin`/`.idx` pair: where its tokens come from."""

from typing import Any

from megatron_memory.exceptions import DataError
from megatron_memory.reading.documents import LARGEST_JSON, parse_json, read_bounded
from megatron_memory.reading.pickles import UnsafeFile

FORMAT = 1


def manifest_path(prefix: str) -> str:
    """Where the manifest of a pair is."""
    return prefix + ".json"


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """The manifest of a pair; None where it has none, as pairs of other programs.

    Raises:
        DataError: it is damaged.
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
    if not isinstance(manifest, dict) or not isinstance(manifest.get("tokenizer", {}), dict):
        raise DataError(f"{path}: not a manifest. Remove it, or preprocess again")
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
