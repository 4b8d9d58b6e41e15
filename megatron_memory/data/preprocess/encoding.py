"""Lines of JSON to token ids. Runs inside the worker processes."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.sources import LineBatch
from megatron_memory.data.tokenizers import build_tokenizer, end_of_document
from megatron_memory.exceptions import DataError

TextEncoder = Callable[[list[str]], list[list[int]]]

# What a batched encoder must agree on with the tokenizer itself before it is used.
_PROBES = [
    "",
    " ",
    "The cat sat on the mat.\n\n\tIt's 12,345.67!  ",
    "naïve Ünïcode 中文 日本語 العربية हिन्दी \U0001f600 e\u0301 \u200b\r\n",
    "<s></s><|endoftext|> [MASK] <unk>",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """Token ids of the documents of one LineBatch."""

    tokens: dict[str, np.ndarray]
    """For each key: the documents' ids one after the other, [tokens], uint16 or int32."""
    lengths: dict[str, np.ndarray]
    """For each key: tokens of each document, [documents], int32; 0 for an empty one."""
    num_documents: int
    num_bytes: int
    """Bytes of the lines, decompressed."""
    bytes_read: int
    """See LineBatch."""


class DocumentEncoder:
    """Tokenizes batches of JSON lines.

    A document's ids are those of the tokenizer's own `tokenize`, followed by the end-of-document
    id where `append_eod` is set and the text gave any token.
    """

    def __init__(self, options: PreprocessOptions) -> None:
        tokenizer = build_tokenizer(
            options.tokenizer_type,
            options.tokenizer_model,
            vocab_size=options.vocab_size,
            include_special_tokens=options.tokenizer_hf_include_special_tokens,
        )
        self.keys = options.json_keys
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.eod = end_of_document(tokenizer) if options.append_eod else None
        self._encode_texts = _text_encoder(tokenizer)

    def __call__(self, batch: LineBatch) -> EncodedBatch:
        """Tokenize one batch.

        Raises:
            DataError: a line is not a JSON object with text under each key.
        """
        documents = [
            _parse_line(line, batch.path, batch.first_line + i, self.keys)
            for i, line in enumerate(batch.lines)
        ]
        tokens, lengths = {}, {}
        for column, key in enumerate(self.keys):
            texts = [document[column] for document in documents]
            ids = self._encode(texts, batch)
            lengths[key] = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
            tokens[key] = np.fromiter(
                itertools.chain.from_iterable(ids), dtype=self.dtype, count=lengths[key].sum()
            )
        return EncodedBatch(
            tokens=tokens,
            lengths=lengths,
            num_documents=len(documents),
            num_bytes=sum(len(line) + 1 for line in batch.lines),
            bytes_read=batch.bytes_read,
        )

    def _encode(self, texts: list[str], batch: LineBatch) -> list[list[int]]:
        try:
            ids = self._encode_texts(texts)
        # A tokenizer raises its library's own kinds of error on text that it refuses.
        except Exception:
            ids = [self._encode_one(text, batch, i) for i, text in enumerate(texts)]
        if self.eod is not None:
            for document in ids:
                if document:
                    document.append(self.eod)
        return ids

    def _encode_one(self, text: str, batch: LineBatch, position: int) -> list[int]:
        try:
            return self._encode_texts([text])[0]
        except Exception as error:
            raise DataError(
                f"{batch.path}, line {batch.first_line + position}: the tokenizer refuses the text "
                f"({type(error).__name__}: {error}). Mend or remove the line"
            ) from error


def _parse_line(line: bytes, path: str, number: int, keys: Iterable[str]) -> list[str]:
    where = f"{path}, line {number}"
    try:
        document = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}). Save the file as UTF-8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        shown = line[:60].decode("utf-8", errors="replace")
        raise DataError(
            f"{where}: not valid JSON ({error}): {shown!r}. Each line must be one JSON object; "
            "mend or remove the line"
        ) from error
    if not isinstance(document, dict):
        raise DataError(
            f"{where}: a JSON {type(document).__name__}, not an object. Each line must be an "
            f"object with the keys of --json-keys: {', '.join(keys)}"
        )
    return [_text_of(document, key, where) for key in keys]


def _text_of(document: dict, key: str, where: str) -> str:
    if key not in document:
        raise DataError(
            f"{where}: has no key {key!r}, only {', '.join(sorted(document)) or 'none'}. Give the "
            "keys that hold text to --json-keys, or mend the line"
        )
    text = document[key]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: {key!r} holds {type(text).__name__}, not a string. Make it a string, or "
            "name another key in --json-keys"
        )
    return text


def _text_encoder(tokenizer: MegatronTokenizerBase) -> TextEncoder:
    """The fastest way to the ids of `tokenizer.tokenize` that agrees with it on the probes."""

    def one_by_one(texts: list[str]) -> list[list[int]]:
        return [list(tokenizer.tokenize(text)) for text in texts]

    if tokenizer.library != "huggingface" or not tokenizer._tokenizer.tokenizer.is_fast:
        return one_by_one
    hugging_face = tokenizer._tokenizer.tokenizer
    add_special_tokens = tokenizer._tokenizer.include_special_tokens

    def batched(texts: list[str]) -> list[list[int]]:
        return hugging_face(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    return batched if batched(_PROBES) == one_by_one(_PROBES) else one_by_one
