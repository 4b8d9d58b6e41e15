"""Vocabularies in one file, SentencePiece's and tiktoken's, before a library opens them."""

import base64
import binascii
from typing import Any

from megatron_memory.reading.documents import LARGEST_JSON, parse_json, read_bounded
from megatron_memory.reading.pickles import UnsafeFile, shown

_NUM_SPECIAL, _DEFAULT_SIZE = 1000, 2**17
"""Ids before tiktoken's entries, and all ids where no --vocab-size is given, in megatron-core."""
_LARGEST_MODEL = 64 << 20
"""Bytes; the vocabularies of 250,000 pieces have 5 MB."""
_KEYS = {"rank", "token_bytes", "token_str"}
_AGAIN = "Copy the tokenizer again, or correct it"


def check_sentencepiece_file(path: str) -> None:
    """That a `.model` is a file of a sensible size: the library reads any, as far as it goes.

    Raises:
        UnsafeFile: names the file.
    """
    try:
        read_bounded(path, _LARGEST_MODEL)
    except UnsafeFile as error:
        raise UnsafeFile(f"{path}: {error}. {_AGAIN}") from error


def check_tiktoken_file(path: str, vocab_size: int | None) -> None:
    """That a vocabulary numbers its entries, has each once, and has as many as are asked for.

    megatron-core lists all ids below `vocab_size` before it compares, and its base 64 omits what is
    none.

    Raises:
        UnsafeFile: names the file, the entry and what is wrong with it.
    """
    try:
        entries = parse_json(read_bounded(path, LARGEST_JSON), limits_depth=False)
        if not isinstance(entries, list):
            raise UnsafeFile("it holds no JSON list")
        seen: dict[bytes, int] = {}
        for rank, entry in enumerate(entries):
            first = seen.setdefault(_token(entry, rank), rank)
            if first != rank:
                raise UnsafeFile(f"entries {first} and {rank} are the same token")
    except UnsafeFile as error:
        raise UnsafeFile(f"{path}: {error}. {_AGAIN}") from error
    asked, held = vocab_size or _DEFAULT_SIZE, len(entries) + _NUM_SPECIAL
    if not _NUM_SPECIAL < asked <= held:
        default = "" if vocab_size else " (without the flag)"
        raise UnsafeFile(
            f"--vocab-size {shown(asked)}{default}: must be above the {_NUM_SPECIAL} special "
            f"tokens, and with the {len(entries)} entries of {path} at most {held}"
        )


def _token(entry: Any, rank: int) -> bytes:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise UnsafeFile(f"entry {rank} does not have just {', '.join(sorted(_KEYS))}")
    if type(entry["rank"]) is not int or entry["rank"] != rank:
        raise UnsafeFile(f"entry {rank} has the rank {shown(entry['rank']):.80}")
    text = entry["token_bytes"]
    try:
        token = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise UnsafeFile(f"token_bytes of entry {rank} is no base 64: {shown(text):.80}") from None
    if not token:
        raise UnsafeFile(f"entry {rank} is empty")
    if rank < 256 and token != bytes([rank]):
        raise UnsafeFile(f"entry {rank} is {token!r:.80}, and must be the byte of that number")
    return token
