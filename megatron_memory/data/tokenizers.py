"""Tokenizers by Megatron's names, built on megatron-core's own classes.

megatron-core takes seconds to import, which only `build_tokenizer` does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_memory.exceptions import ConfigurationError, DataError
from megatron_memory.reading.panics import panics_as_errors
from megatron_memory.reading.pickles import shown
from megatron_memory.reading.tokenizer_files import check_tokenizer_files
from megatron_memory.reading.tokenizer_vocabularies import (
    check_sentencepiece_file,
    check_tiktoken_file,
)
from megatron_memory.upstream import core

if TYPE_CHECKING:
    from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

_LIBRARIES = {
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "GPTSentencePieceTokenizer": "sentencepiece",
    "Llama2Tokenizer": "sentencepiece",
    "TikTokenizer": "tiktoken",
    "ByteLevelTokenizer": "byte-level",
    "NullTokenizer": core.NULL_TOKENIZER,
}
TOKENIZER_TYPES = tuple(_LIBRARIES)
_WITHOUT_FILES = ("byte-level", core.NULL_TOKENIZER)
_MOST_IDS = 2**31

_NUM_BYTES = 256
_BYTE_LEVEL_OPTIONS = {
    "vocab_size": _NUM_BYTES,
    "special_tokens": ["<eod>", "<bos>"],
    "_bos_id": _NUM_BYTES,
    "_eos_id": _NUM_BYTES + 1,
    # megatron-core's default pads with byte 1, which would hide that byte's loss.
    "_pad_id": None,
}


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | None = None,
    *,
    vocab_size: int | None = None,
    include_special_tokens: bool = False,
) -> MegatronTokenizerBase:
    """Build the tokenizer that a run names.

    Args:
        tokenizer_type: one of TOKENIZER_TYPES. `ByteLevelTokenizer` is the text's UTF-8 bytes with
            256 for the begin and 257 for the end of a document.
        tokenizer_model: a folder or a name of the Hugging Face hub, a SentencePiece `.model`, or
            a tiktoken vocabulary in `.json`. The last two types of the list take none.
        vocab_size: NullTokenizer, which needs it: the number of ids besides the end of document;
            TikTokenizer: entries to keep, special tokens included.
        include_special_tokens: HuggingFaceTokenizer: add the special tokens that its template
            puts around a text.

    Returns:
        megatron-core's tokenizer: `.tokenize(text)`, `.detokenize(ids)`, `.vocab_size`, `.eod`.

    Raises:
        ConfigurationError: unknown type, or a flag that the type needs is missing.
        DataError: the tokenizer's files are missing or cannot be read.
    """
    library = check_tokenizer_flags(tokenizer_type, tokenizer_model, vocab_size)
    from megatron.core.tokenizers import MegatronTokenizer

    options: dict[str, Any] = {}
    if library == "huggingface":
        options = {"use_fast": True, "include_special_tokens": include_special_tokens}
    elif library == "byte-level":
        options = dict(_BYTE_LEVEL_OPTIONS)
    elif library == core.NULL_TOKENIZER and vocab_size is not None:
        options = {"vocab_size": core.null_vocab_size(vocab_size)}
    elif library == "tiktoken" and vocab_size is not None:
        options = {"vocab_size": vocab_size}
    try:
        if library == "huggingface":
            check_tokenizer_files(str(tokenizer_model))
        elif library == "sentencepiece":
            check_sentencepiece_file(str(tokenizer_model))
        elif library == "tiktoken":
            check_tiktoken_file(str(tokenizer_model), vocab_size)
        with panics_as_errors():
            return MegatronTokenizer.from_pretrained(
                tokenizer_path=None if library in _WITHOUT_FILES else tokenizer_model,
                metadata_path={"library": library},
                **options,
            )
    # The libraries raise nearly anything on a damaged file: AssertionError, KeyError, RuntimeError.
    except Exception as error:
        raise DataError(
            f"--tokenizer-model {tokenizer_model}: cannot be read as {tokenizer_type} "
            f"({type(error).__name__}: {error}). {_EXPECTED_MODEL[library]}"
        ) from error


_EXPECTED_MODEL = {
    "huggingface": "Give a folder with tokenizer.json and tokenizer_config.json, or a hub name",
    "sentencepiece": "Give the .model file that SentencePiece wrote",
    "tiktoken": "Give the .json vocabulary (a list of rank, token_bytes, token_str), and with "
    "--vocab-size no more entries than it has",
    "byte-level": "This type reads no file: this installation of megatron-core does not fit",
    core.NULL_TOKENIZER: "--vocab-size must be a whole number",
}


def check_tokenizer_flags(
    tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None
) -> str:
    """megatron-core's name of the library that a tokenizer's type belongs to.

    Raises:
        ConfigurationError: unknown type, or a flag that the type needs is missing.
        DataError: the tokenizer's files are missing.
    """
    if tokenizer_type not in _LIBRARIES:
        raise ConfigurationError(
            f"--tokenizer-type {tokenizer_type}: unknown. Choose one of {', '.join(_LIBRARIES)}"
        )
    library = _LIBRARIES[tokenizer_type]
    if library == core.NULL_TOKENIZER and vocab_size is None:
        raise ConfigurationError("--tokenizer-type NullTokenizer needs --vocab-size")
    if library == core.NULL_TOKENIZER and vocab_size is not None and not 0 < vocab_size < _MOST_IDS:
        raise ConfigurationError(
            f"--vocab-size {shown(vocab_size)}: must be above 0 and below {_MOST_IDS}, the "
            "ids that a file of tokens can hold"
        )
    if library in _WITHOUT_FILES:
        return library
    if not tokenizer_model:
        raise ConfigurationError(f"--tokenizer-type {tokenizer_type} needs --tokenizer-model")
    if not os.path.exists(tokenizer_model) and (
        library != "huggingface" or not _may_be_hub_name(tokenizer_model)
    ):
        raise DataError(
            f"--tokenizer-model {tokenizer_model}: no such file or folder. "
            f"{_EXPECTED_MODEL[library]}"
        )
    return library


def _may_be_hub_name(name: str) -> bool:
    """Hub names are `name` or `owner/name`; anything else can only be a path."""
    parts = name.split("/")
    return len(parts) <= 2 and all(part not in ("", ".", "..") for part in parts)


def end_of_document(tokenizer: MegatronTokenizerBase) -> int:
    """The tokenizer's end-of-document id.

    Raises:
        DataError: the tokenizer defines none.
    """
    # Tokenizers without one answer None, or a negative id (SentencePiece).
    eod = tokenizer.eod
    if eod is None or eod < 0:
        raise no_end_of_document(tokenizer.path)
    return int(eod)


def no_end_of_document(path: str | None) -> DataError:
    """The error of a tokenizer that defines no end of a document."""
    return DataError(
        f"--tokenizer-model {path}: has no end-of-sequence token, which "
        "--append-eod, --reset-position-ids, --reset-attention-mask and --eod-mask-loss need. "
        "Set eos_token in its tokenizer_config.json (SentencePiece: train it with an "
        "eos_id), or use another tokenizer"
    )


def padded_vocab_size(
    vocab_size: int, make_vocab_size_divisible_by: int, tensor_parallel_size: int
) -> int:
    """Entries of the embedding table: `vocab_size` rounded up so that every rank holds as many.

    A multiple of `make_vocab_size_divisible_by * tensor_parallel_size`, as in Megatron-LM.

    Raises:
        ConfigurationError: an argument is not positive.
    """
    for flag, value in (
        ("--vocab-size", vocab_size),
        ("--make-vocab-size-divisible-by", make_vocab_size_divisible_by),
        ("--tensor-model-parallel-size", tensor_parallel_size),
    ):
        if value < 1:
            raise ConfigurationError(f"{flag} {value}: must be at least 1")
    multiple = make_vocab_size_divisible_by * tensor_parallel_size
    return -(-vocab_size // multiple) * multiple


def num_ids(tokenizer: MegatronTokenizerBase) -> int:
    """Ids that a tokenizer may give: its largest and one, which is more than it has entries where
    there are holes between them."""
    if tokenizer.library == "huggingface":
        return num_ids_of(tokenizer._tokenizer.tokenizer.get_vocab())
    return int(tokenizer.vocab_size)


def num_ids_of(vocabulary: Mapping[str, int]) -> int:
    """The largest id of a vocabulary and one."""
    return max(vocabulary.values(), default=-1) + 1


def ids_without_token(tokenizer: MegatronTokenizerBase) -> list[int]:
    """Holes between a tokenizer's ids: no text gives them, and they have none."""
    if tokenizer.library != "huggingface":
        return []
    ids = set(tokenizer._tokenizer.tokenizer.get_vocab().values())
    return sorted(set(range(max(ids, default=-1))) - ids)


def check_vocab_size(tokenizer: MegatronTokenizerBase, vocab_size: int | None) -> int:
    """Rows before padding: `vocab_size` where the run gives one, else the tokenizer's ids.

    Raises:
        ConfigurationError: the tokenizer has ids beyond `vocab_size`.
    """
    ids = num_ids(tokenizer)
    # A NullTokenizer's --vocab-size does not count the end of a document, as in Megatron-LM.
    if vocab_size is None or (tokenizer.library == core.NULL_TOKENIZER and ids == vocab_size + 1):
        return ids
    if ids > vocab_size:
        raise ConfigurationError(
            f"--vocab-size {vocab_size}: the tokenizer {tokenizer.path} has ids up to {ids - 1}. "
            f"Raise --vocab-size to at least {ids}, or omit the flag"
        )
    return vocab_size
