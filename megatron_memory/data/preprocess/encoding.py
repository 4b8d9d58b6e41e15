"""Blocks of text to token ids. Runs inside the worker processes."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from megatron_memory.data.preprocess.blocks import Block, Position
from megatron_memory.data.preprocess.documents import NUM_NAMED, Documents, read_documents
from megatron_memory.data.preprocess.fast_bpe import TokenMismatch

BatchEncoder = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
"""Texts -> their ids one after the other, and how many each has. Raises on a text it refuses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """Token ids of the documents of one block."""

    tokens: dict[str, np.ndarray]
    """For each key: the documents' ids one after the other, [tokens], uint16 or int32."""
    lengths: dict[str, np.ndarray]
    """For each key: tokens of each document, [documents], int32; 0 for an empty one."""
    num_documents: int
    problems: list[tuple[int, str]]
    """See Documents."""
    num_problems: int
    """See Documents."""
    num_bytes: int
    """Bytes of the block, decompressed."""
    end: Position
    """Where the next block begins."""


class DocumentEncoder:
    """Tokenizes blocks.

    A document's ids are those of the tokenizer, followed by the end-of-document id where there is
    one and the text gave any token.
    """

    def __init__(
        self,
        *,
        keys: tuple[str, ...],
        encode: BatchEncoder,
        eod: int | None,
        vocab_size: int,
        dtype: np.dtype,
    ) -> None:
        self.keys = keys
        self.eod = eod
        self.vocab_size = vocab_size
        self.dtype = dtype
        self._encode = encode

    def __call__(self, block: Block) -> EncodedBlock:
        """Tokenize one block. Raises TokenMismatch where gigatoken fails."""
        documents = read_documents(block, self.keys)
        try:
            encoded = {key: self._encode_texts(documents.texts[key]) for key in self.keys}
        except TokenMismatch:
            raise
        # A tokenizer raises its library's own kinds of error on text that it refuses.
        except Exception:
            documents = self._without_refused(documents)
            encoded = {key: self._encode_texts(documents.texts[key]) for key in self.keys}
        return EncodedBlock(
            tokens={key: tokens for key, (tokens, _) in encoded.items()},
            lengths={key: lengths for key, (_, lengths) in encoded.items()},
            num_documents=len(documents.numbers),
            problems=documents.problems,
            num_problems=documents.num_problems,
            num_bytes=block.num_bytes,
            end=block.end,
        )

    def _encode_texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = self._encode(texts)
        lengths = lengths.astype(np.int64)
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"the tokenizer gives ids from {ids.min()} to {ids.max()}, but has "
                f"{self.vocab_size} entries"
            )
        if self.eod is None:
            return ids.astype(self.dtype), lengths.astype(np.int32)
        ends = np.cumsum(lengths)[lengths > 0]
        with_ends = np.insert(ids.astype(self.dtype), ends, self.dtype.type(self.eod))
        return with_ends, (lengths + (lengths > 0)).astype(np.int32)

    def _without_refused(self, documents: Documents) -> Documents:
        """The documents whose every text the tokenizer takes."""
        kept, problems = [], list(documents.problems)
        for position, number in enumerate(documents.numbers):
            try:
                for key in self.keys:
                    self._encode_texts([documents.texts[key][position]])
                kept.append(position)
            except TokenMismatch:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                problems.append(
                    (number, f"the tokenizer refuses the text ({reason}). Fix or remove the line")
                )
        return Documents(
            texts={key: [texts[i] for i in kept] for key, texts in documents.texts.items()},
            numbers=[documents.numbers[i] for i in kept],
            problems=sorted(problems)[:NUM_NAMED],
            num_problems=documents.num_problems + len(documents.numbers) - len(kept),
        )


def list_encoder(encode: Callable[[list[str]], list[list[int]]]) -> BatchEncoder:
    """A BatchEncoder from a function that gives lists of ids."""

    def batch(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = encode(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        flat = itertools.chain.from_iterable(ids)
        return np.fromiter(flat, dtype=np.int64, count=int(lengths.sum())), lengths

    return batch
