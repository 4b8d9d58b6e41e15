"""Which tokenizer definitions gigatoken is known to honour: whatever is not on this list, is not.

tests/data/preprocess/test_fast_definitions.py compares each entry with the tokenizers library.
gigatoken reads more than it honours, without a word: `single_word`, `dropout`, other behaviours of
a split, suffixes of words, truncation.
"""

import importlib.metadata
import itertools
from typing import Any

Json = dict[str, Any]

EXAMINED_VERSIONS = ("0.10.0",)
"""Of gigatoken."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLITS = {
    "Qwen 2": _CONTRACTIONS + _WORDS + r"|\p{N}" + _REST,
    "Llama 3": _CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _REST,
    "Qwen 3.5": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "GPT-4o": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""Patterns of `Split` before `ByteLevel`; GPT-2's is that of `ByteLevel` itself."""

_SPACE_MARK = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": _SPACE_MARK}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE_MARK}
_MARKERS: tuple[list[Json], ...] = (
    [],
    [_PREPEND],
    [_REPLACE],
    [_PREPEND, _REPLACE],
    [_REPLACE, _PREPEND],
)
_NFC = {"type": "NFC"}

_MODEL_OPTIONS = {"type", "vocab", "merges", "dropout", "unk_token", "fuse_unk", "byte_fallback"}
_MODEL_OPTIONS |= {"ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"}
_TOKEN_OPTIONS = {"id", "content", "special", "normalized", "lstrip", "rstrip", "single_word"}
# Pairs of added tokens that are looked at for overlaps.
_MOST_PAIRS = 50_000


def why_not_fast(definition: Json) -> str | None:
    """What gigatoken is not known to honour, or None.

    Args:
        definition: a `tokenizer.json` as the tokenizers library writes it, which gives added tokens
            other ids than a file may say.
    """
    version = importlib.metadata.version("gigatoken")
    if version not in EXAMINED_VERSIONS:
        return f"version {version} was not examined, only {', '.join(EXAMINED_VERSIONS)}"
    for name in ("truncation", "padding"):
        if definition[name] is not None:
            return f"{name}"
    reason = _of_model(definition["model"])
    return reason or _of_splitting(definition) or _of_added_tokens(definition)


def normalizes(definition: Json) -> bool:
    """Whether a definition that is honoured has NFC."""
    return _NFC in _steps(definition["normalizer"], "normalizers")


def splits_by_categories(definition: Json) -> bool:
    """Whether a definition that is honoured splits texts by Unicode's categories."""
    return not definition["model"]["byte_fallback"]


def _of_model(model: Json) -> str | None:
    if model["type"] != "BPE":
        return f"a model {model['type']}"
    if unknown := model.keys() - _MODEL_OPTIONS:
        return f"the model's {', '.join(sorted(unknown))}"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            return f"the model's {name} {model[name]!r}"
    if model["unk_token"] is not None and model["unk_token"] not in model["vocab"]:
        return f"the model's unk_token {model['unk_token']!r}, which its vocabulary lacks"
    return None


def _of_splitting(definition: Json) -> str | None:
    """Of the normaliser and the pre-tokenizer, which must fit the kind of BPE."""
    before = _steps(definition["normalizer"], "normalizers")
    splits = _steps(definition["pre_tokenizer"], "pretokenizers")
    if definition["model"]["byte_fallback"]:
        missing = [b for b in range(256) if f"<0x{b:02X}>" not in definition["model"]["vocab"]]
        if missing:
            return f"byte_fallback without the token <0x{missing[0]:02X}>"
        is_known = (before in _MARKERS and not splits) or _is_marked_otherwise(before, splits)
    else:
        if before not in ([], [_NFC]):
            return f"the normalizer {definition['normalizer']}"
        is_known = _is_byte_level(definition["pre_tokenizer"])
    if is_known:
        return None
    return f"the normalizer {_shown(before)} with the pre-tokenizer {_shown(splits)}"


def _is_marked_otherwise(before: list[Json], splits: list[Json]) -> bool:
    """Spaces marked by the pre-tokenizer, or split off after they are (Gemma's)."""
    if len(splits) != 1:
        return False
    (split,) = splits
    if split["type"] == "Metaspace":
        return before == [] and split["replacement"] == _SPACE_MARK
    behavior = (split.get("pattern"), split.get("behavior"), split.get("invert"))
    known = ({"String": " "}, "MergedWithPrevious", False)
    return before == [_REPLACE] and split["type"] == "Split" and behavior == known


def _is_byte_level(pre_tokenizer: Json | None) -> bool:
    splits = _steps(pre_tokenizer, "pretokenizers")
    if pre_tokenizer is None or not splits or splits[-1]["type"] != "ByteLevel":
        return False
    if len(splits) == 1:
        return pre_tokenizer["type"] == "ByteLevel" and splits[0]["use_regex"]
    split, byte_level = splits[0], splits[-1]
    return (
        len(splits) == 2
        and not byte_level["use_regex"]
        and not byte_level["add_prefix_space"]
        and split["type"] == "Split"
        and split["pattern"].get("Regex") in SPLITS.values()
        and split["behavior"] == "Isolated"
        and not split["invert"]
    )


def _steps(step: Json | None, name: str) -> list[Json]:
    if step is None:
        return []
    return [step] if step["type"] != "Sequence" else step[name]


def _shown(steps: list[Json]) -> str:
    """Each step's options, the last ones first: a split's pattern may be long."""
    shown = [str(dict(reversed(step.items())))[:160] for step in steps[:3]]
    return ", ".join(shown) or "(none)"


def _of_added_tokens(definition: Json) -> str | None:
    tokens, vocab = definition["added_tokens"], definition["model"]["vocab"]
    ids = set(vocab.values())
    for token in tokens:
        if unknown := token.keys() - _TOKEN_OPTIONS:
            return f"the added token {token['content']!r} with {', '.join(sorted(unknown))}"
        if token["single_word"]:
            return f"the added token {token['content']!r} with single_word"
        if not token["content"]:
            return "an added token without a character"
        if vocab.get(token["content"], token["id"]) != token["id"] or (
            token["content"] not in vocab and token["id"] in ids
        ):
            return f"the added token {token['content']!r} with the id of another one"
    for name in ("id", "content"):
        if len({token[name] for token in tokens}) < len(tokens):
            return f"two added tokens with the same {name}"
    return _of_stripping(tokens) or _of_two_passes(definition)


def _of_stripping(tokens: list[Json]) -> str | None:
    """Two tokens must not both want the same spaces."""
    strips = [token["content"] for token in tokens if token["lstrip"] or token["rstrip"]]
    spaces = [token["content"] for token in tokens if any(map(str.isspace, token["content"]))]
    if strips and spaces:
        return f"the added token {strips[0]!r} with lstrip or rstrip beside {spaces[0]!r}"
    return None


def _of_two_passes(definition: Json) -> str | None:
    """The tokenizers library looks for tokens with `normalized` in a second pass, in the rest of
    the text after the normaliser; gigatoken looks for all in one."""
    tokens = definition["added_tokens"]
    later = [token["content"] for token in tokens if token["normalized"]]
    first = [token["content"] for token in tokens if not token["normalized"]]
    if definition["normalizer"] is not None:
        for content in later:
            if not content.isascii() or " " in content:
                return f"the added token {content!r} with normalized, which the normalizer changes"
    if len(first) * len(later) > _MOST_PAIRS:
        return f"{len(first)} added tokens beside {len(later)} with normalized: too many to compare"
    for one, other in itertools.product(first, later):
        if _overlap(one, other):
            return f"the added token {other!r} with normalized, which overlaps {one!r}"
    return None


def _overlap(one: str, other: str) -> bool:
    """Whether a text can have both, with characters in common."""
    if one in other or other in one:
        return True
    return any(
        one.endswith(other[:length]) or other.endswith(one[:length])
        for length in range(1, min(len(one), len(other)))
    )
