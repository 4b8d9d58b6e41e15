"""How much longer a tokenizer's replacements make a text: each step may multiply what the one
before has made, so that a small file asks for gigabytes."""

import json
from collections.abc import Iterator
from typing import Any

from megatron_memory.reading.panics import panics_as_errors
from megatron_memory.reading.pickles import UnsafeFile

_LONGEST_REPLACEMENT = 1024
_MOST_GROWTH = 64
"""Times as many characters as before. Compatibility forms make 18 of one."""
_ANY_TEXT = "a.1 \n_é中"


def check_growth(definition: dict[str, Any]) -> None:
    """Try a definition's replacements one after the other, on the characters that they name.

    Args:
        definition: content of a tokenizer.json.

    Raises:
        UnsafeFile: they make a text more than 64 times as long.
    """
    for part in ("normalizer", "decoder"):
        steps = [*_replacements(definition.get(part))]
        text = "".join(dict.fromkeys(_ANY_TEXT + "".join(map(_named_by, steps))))
        most = _MOST_GROWTH * len(text)
        for step in steps:
            text = _applied(step, text)
            if len(text) > most:
                raise UnsafeFile(
                    f"the replacements of its {part} make a text more than {_MOST_GROWTH} times as "
                    "long"
                )


def _replacements(part: Any) -> Iterator[dict[str, Any]]:
    pending = [part]
    while pending:
        step = pending.pop(0)
        if not isinstance(step, dict):
            continue
        kind = step.get("type")
        if kind == "Sequence":
            inner = step.get("normalizers") or step.get("decoders")
            pending = [*(inner if isinstance(inner, list) else ()), *pending]
        elif kind == "Replace" and isinstance(step.get("content"), str):
            if len(step["content"]) > _LONGEST_REPLACEMENT:
                raise UnsafeFile(
                    f"a replacement of {len(step['content'])} characters, and at most "
                    f"{_LONGEST_REPLACEMENT} are used"
                )
            yield step


def _named_by(step: dict[str, Any]) -> str:
    """The characters of its pattern, a regular expression's signs among them, and of its text."""
    pattern = step.get("pattern")
    texts = pattern.values() if isinstance(pattern, dict) else ()
    return "".join(text for text in texts if isinstance(text, str)) + step["content"]


def _applied(step: dict[str, Any], text: str) -> str:
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        with panics_as_errors():
            tokenizer = Tokenizer.from_str(json.dumps({"model": model, "normalizer": step}))
            return tokenizer.normalizer.normalize_str(text)
    # What the library refuses here, it refuses when the tokenizer is loaded, by the step's name.
    except Exception:
        return text
