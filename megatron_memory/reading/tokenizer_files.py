"""Tokenizers' files, before a library opens them: ids that no model has rows for."""

import os
from collections.abc import Iterator
from typing import Any

from megatron_memory.reading.documents import LARGEST_JSON, parse_json, read_bounded
from megatron_memory.reading.pickles import UnsafeFile, shown
from megatron_memory.reading.tokenizer_growth import check_growth

LARGEST_ID = 10_000_000
"""Tokenizers have up to a million entries. Who makes a list or a table for the ids makes one for
all below the largest."""


def check_tokenizer_files(path: str | os.PathLike[str]) -> None:
    """Check a tokenizer's folder, or its one file, where it is on this machine.

    Raises:
        UnsafeFile: names the file, what is wrong, and what to do.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")
    files = [os.path.join(path, name) for name in names] if os.path.isdir(path) else []
    for file in filter(os.path.isfile, files):
        try:
            content = parse_json(read_bounded(file, LARGEST_JSON), limits_depth=False)
            for token, number in _ids(os.path.basename(file), content):
                _check_id(token, number)
            if os.path.basename(file) == "tokenizer.json":
                _check_draws(content)
                check_growth(content)
        except OSError as error:
            raise UnsafeFile(f"{file}: {error.strerror}") from error
        except UnsafeFile as error:
            raise UnsafeFile(f"{file}: {error}. Copy the tokenizer again, or correct it") from error


def _check_draws(definition: dict[str, Any]) -> None:
    model = definition.get("model")
    dropout = model.get("dropout") if isinstance(model, dict) else None
    if dropout:
        raise UnsafeFile(
            f"its model has dropout {shown(dropout):.80}, which draws a text's ids anew each time, "
            "so that no two runs have the same tokens: set it to null"
        )


def _ids(name: str, content: Any) -> Iterator[tuple[Any, Any]]:
    if not isinstance(content, dict):
        raise UnsafeFile("it holds no JSON object")
    if name == "tokenizer_config.json":
        decoder = content.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise UnsafeFile("its added_tokens_decoder is no JSON object")
        for text, token in decoder.items():
            # What int() refuses for its length is no id either.
            yield token, int(text) if text.isdecimal() and len(text) < 20 else text
    elif name == "tokenizer.json":
        model, added = content.get("model"), content.get("added_tokens") or []
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        # Those of the kind Unigram are numbered by their places.
        if isinstance(vocabulary, dict):
            yield from vocabulary.items()
        if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
            raise UnsafeFile("its added_tokens are no list of JSON objects")
        for token in added:
            yield token.get("content"), token.get("id")
    else:
        yield from content.items()


def _check_id(token: Any, number: Any) -> None:
    if type(number) is not int or not 0 <= number < LARGEST_ID:
        raise UnsafeFile(
            f"the id of {shown(token):.80} is {shown(number):.80}, and must be a whole number from "
            f"0 to {LARGEST_ID - 1}"
        )
