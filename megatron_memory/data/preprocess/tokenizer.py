"""The tokenizer of a preprocessing run, with no more imports than it needs.

megatron-core takes about ten seconds to import, transformers with torch six, transformers without
torch two. A folder that says all there is to say in its `tokenizer.json` needs none of them.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from megatron_memory.data.tokenizer_hash import PROBE_TEXTS, hash_of, tokenizer_hash
from megatron_memory.data.tokenizers import (
    build_tokenizer,
    check_tokenizer_flags,
    end_of_document,
    num_ids,
    num_ids_of,
)
from megatron_memory.exceptions import ConfigurationError, DataError
from megatron_memory.reading.documents import LARGEST_JSON, read_bounded
from megatron_memory.reading.panics import panics_as_errors, without_panics
from megatron_memory.reading.tokenizer_files import check_tokenizer_files

_NAMED_TOKENS = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# Of tokenizer_config.json: what does not change how text becomes tokens.
_HARMLESS_KEYS = {"tokenizer_class", "backend", "model_max_length", "clean_up_tokenization_spaces"}
_HARMLESS_KEYS |= {"chat_template", "padding_side", "truncation_side", "model_input_names"}
_PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers looks for a known mistake in the tokenizers that are larger.
_LARGEST_PLAIN = 100_000


class TokenizerOptions(Protocol):
    """The flags that name a tokenizer; `build_tokenizer` says what each means."""

    @property
    def tokenizer_type(self) -> str: ...
    @property
    def tokenizer_model(self) -> str | None: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def tokenizer_hf_include_special_tokens(self) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """A tokenizer of any library, as `build_tokenizer` of the same flags has it."""

    encode: Callable[[list[str]], list[list[int]]]
    """The ids of each text. Raises the library's own kinds of error on a text that it refuses."""
    decode: Callable[[list[int]], str]
    """The text of ids, special tokens in it."""
    vocab_size: int
    eod: int | None
    """The end-of-document id; None where the tokenizer has none."""
    hash: str
    """See tokenizer_hash; whether special tokens are added does not change it."""
    definition: str | None
    """What says how a text becomes ids, for Hugging Face's fast tokenizers: a `tokenizer.json` as
    the tokenizers library writes it, with the ids that it gives."""


def load_text_tokenizer(options: TokenizerOptions) -> TextTokenizer:
    """Load the tokenizer that the flags name.

    Raises:
        ConfigurationError: unknown type, or a flag that it needs is missing.
        DataError: its files are missing or cannot be read.
    """
    library = check_tokenizer_flags(
        options.tokenizer_type, options.tokenizer_model, options.vocab_size
    )
    if options.tokenizer_hf_include_special_tokens and library != "huggingface":
        raise ConfigurationError(
            "--tokenizer-hf-include-special-tokens: is of HuggingFaceTokenizer, and "
            f"--tokenizer-type is {options.tokenizer_type}, which adds none. Omit the flag"
        )
    if library == "huggingface":
        assert options.tokenizer_model is not None, "checked above"
        found = _load_plain_folder(options) or _load_with_transformers(options)
    else:
        found = _load_with_megatron(options)
    return dataclasses.replace(
        found, encode=without_panics(found.encode), decode=without_panics(found.decode)
    )


def _load_plain_folder(options: TokenizerOptions) -> TextTokenizer | None:
    """A folder whose tokenizer.json is the whole tokenizer; None if it may not be."""
    folder = str(options.tokenizer_model)
    if not os.path.isdir(folder) or options.tokenizer_hf_include_special_tokens:
        return None
    names = {name for name in os.listdir(folder) if not name.startswith(".")}
    if names - {"chat_template.jinja"} != {"tokenizer.json", "tokenizer_config.json"}:
        return None
    try:
        definition, config = (
            _read_text(os.path.join(folder, name))
            for name in ("tokenizer.json", "tokenizer_config.json")
        )
        check_tokenizer_files(folder)
        named = _plain_named_tokens(json.loads(definition), json.loads(config))
        with panics_as_errors():
            return None if named is None else _from_definition(definition, named)
    # The tokenizers library raises plain Exception. transformers says what is wrong.
    except Exception:
        return None


def _read_text(path: str) -> str:
    return read_bounded(path, LARGEST_JSON).decode("utf-8")


def _plain_named_tokens(definition: dict, config: dict) -> dict[str, str] | None:
    """The tokens that tokenizer_config.json names, if it says nothing else of consequence."""
    named = {key: config[key] for key in _NAMED_TOKENS if config.get(key) is not None}
    added = {token["content"]: token for token in definition["added_tokens"]}
    plain = (
        config.get("tokenizer_class") in _PLAIN_CLASSES
        and config.keys() <= {*_HARMLESS_KEYS, *_NAMED_TOKENS}
        and definition["truncation"] is None
        and definition["padding"] is None
        and len(definition["model"]["vocab"]) + len(added) < _LARGEST_PLAIN
        and all(
            isinstance(text, str) and _is_plain_special(added.get(text)) for text in named.values()
        )
    )
    return named if plain else None


def _is_plain_special(token: dict | None) -> bool:
    """Whether transformers, told that this token is a special one, would change nothing."""
    return (
        token is not None
        and token["special"]
        and not any(token[flag] for flag in ("normalized", "lstrip", "rstrip", "single_word"))
    )


def _from_definition(definition: str, named: dict[str, str]) -> TextTokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(definition)
    end = named.get("eos_token") or named.get("sep_token")

    def encode(texts: list[str]) -> list[list[int]]:
        return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    eod = None if end is None else tokenizer.token_to_id(end)
    return TextTokenizer(
        encode=encode,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        vocab_size=num_ids_of(vocabulary),
        eod=eod,
        hash=tokenizer_hash(
            lambda text: encode([text])[0],
            vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
            eod=eod,
            vocabulary=vocabulary,
        ),
        definition=tokenizer.to_str(),
    )


def _load_with_transformers(options: TokenizerOptions) -> TextTokenizer:
    with _without_torch():
        from transformers import AutoTokenizer
    try:
        check_tokenizer_files(str(options.tokenizer_model))
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(options.tokenizer_model, use_fast=True)
            tokenizer.add_special_tokens(_as_megatron_names_them(tokenizer))
    # It raises nearly anything on a damaged folder; build_tokenizer has the words for it.
    except Exception as error:
        raise DataError(
            f"--tokenizer-model {options.tokenizer_model}: cannot be read as "
            f"HuggingFaceTokenizer ({type(error).__name__}: {error}). Give a folder with "
            "tokenizer.json and tokenizer_config.json, or a hub name"
        ) from error
    eos = tokenizer.eos_token
    eod = None if eos is None else tokenizer.convert_tokens_to_ids([eos])[0]
    adds_special_tokens = options.tokenizer_hf_include_special_tokens
    plain = tokenizer.is_fast and not adds_special_tokens
    return TextTokenizer(
        encode=_transformers_encoder(tokenizer, adds_special_tokens),
        decode=lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        vocab_size=num_ids_of(tokenizer.get_vocab()),
        eod=eod,
        hash=tokenizer_hash(
            lambda text: tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)),
            vocab_size=len(tokenizer),
            eod=eod,
            vocabulary=tokenizer.get_vocab(),
        ),
        definition=tokenizer.backend_tokenizer.to_str() if plain else None,
    )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """transformers, imported here, does without torch: its models need it, tokenizers do not."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    # The import system's own mark of a module that is not to be found.
    sys.modules["torch"] = None  # type: ignore[assignment]
    # It would advise to install torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    finally:
        del sys.modules["torch"]


def _as_megatron_names_them(tokenizer: Any) -> dict[str, Any]:
    """The special tokens that megatron-core's HuggingFaceTokenizer sets, each from its twin."""
    named: dict[str, Any] = {}
    for one, other in (("sep_token", "eos_token"), ("bos_token", "cls_token")):
        of_one, of_other = getattr(tokenizer, one), getattr(tokenizer, other)
        if of_one is None and of_other:
            named[one] = of_other
        elif of_other is None and of_one:
            named[other] = of_one
    return {**named, "additional_special_tokens": []}


def _transformers_encoder(
    tokenizer: Any, include_special_tokens: bool
) -> Callable[[list[str]], list[list[int]]]:
    def one_by_one(texts: list[str]) -> list[list[int]]:
        if include_special_tokens:
            return [list(tokenizer(text).input_ids) for text in texts]
        return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]

    def batched(texts: list[str]) -> list[list[int]]:
        return tokenizer(
            texts,
            add_special_tokens=include_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    probes = list(PROBE_TEXTS)
    try:
        with panics_as_errors():
            agrees = tokenizer.is_fast and batched(probes) == one_by_one(probes)
    # It refuses a probe, with any kind of error. Which texts it refuses is said of each.
    except Exception:
        agrees = False
    return batched if agrees else one_by_one


def _load_with_megatron(options: TokenizerOptions) -> TextTokenizer:
    from megatron_memory.runtime import prepare_megatron

    prepare_megatron()
    tokenizer = build_tokenizer(
        options.tokenizer_type, options.tokenizer_model, vocab_size=options.vocab_size
    )
    try:
        eod = end_of_document(tokenizer)
    except DataError:
        eod = None
    return TextTokenizer(
        encode=lambda texts: [list(tokenizer.tokenize(text)) for text in texts],
        decode=tokenizer.detokenize,
        vocab_size=num_ids(tokenizer),
        eod=eod,
        hash=hash_of(tokenizer),
        definition=None,
    )
