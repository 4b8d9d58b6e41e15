"""A name for what a tokenizer does, so that data and model can be held to the same one."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_memory.reading.panics import panics_as_errors

if TYPE_CHECKING:
    from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

TOKENIZER_HASH = "tokenizer_hash"
"""Where a checkpoint's plain values have the hash of the training's tokenizer."""

PROBE_TEXTS = (
    "",
    " ",
    "The cat sat on the mat.\n\n\tIt's 12,345.67!  ",
    "naïve Ünïcode 中文 日本語 العربية हिन्दी \U0001f600 e\u0301 \u200b\r\n",
    "<s></s><|endoftext|> [MASK] <unk><|im_start|>",
    "x\x00y\u2028\ufeffz\xa0\u3000a",
    "def f(x):\n    return x ** 2  # WHY?\n\n\n",
)
"""Texts on which tokenizers differ: spaces, digits, scripts, special tokens, control characters."""


def tokenizer_hash(
    encode: Callable[[str], Sequence[int]],
    *,
    vocab_size: int,
    eod: int | None,
    vocabulary: dict[str, int] | None,
) -> str:
    """SHA-256 over what tells tokenizers apart, not over their files, which other versions of a
    library write differently.

    Args:
        encode: ids of a text, without the special tokens that a template puts around it.
        vocab_size: ids of the tokenizer.
        eod: its end-of-document id, if any.
        vocabulary: id of each token; None where the library has no list of them.
    """
    digest = hashlib.sha256(json.dumps([vocab_size, eod]).encode())
    for token, number in sorted((vocabulary or {}).items(), key=lambda item: item[::-1]):
        digest.update(json.dumps([number, token]).encode())
    for text in PROBE_TEXTS:
        try:
            with panics_as_errors():
                ids = [int(number) for number in encode(text)]
        # Libraries raise what they like on text that they refuse; refusing is a mark, too.
        except Exception:
            ids = [-1]
        digest.update(json.dumps(ids).encode())
    return digest.hexdigest()


def hash_of(tokenizer: "MegatronTokenizerBase") -> str:
    """`tokenizer_hash` of a tokenizer that `build_tokenizer` made."""
    eod = tokenizer.eod
    encode: Callable[[str], Sequence[int]] = tokenizer.tokenize
    vocabulary = None
    if tokenizer.library == "huggingface":
        inner = tokenizer._tokenizer.tokenizer
        vocabulary = inner.get_vocab()

        def encode(text: str) -> Sequence[int]:
            return inner.convert_tokens_to_ids(inner.tokenize(text))

    return tokenizer_hash(
        encode,
        vocab_size=int(tokenizer.vocab_size),
        eod=None if eod is None or eod < 0 else int(eod),
        vocabulary=vocabulary,
    )
