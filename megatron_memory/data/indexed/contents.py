"""What is in a pair: whether its ids are sound, how long its documents are, which tokens occur."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from megatron_memory.data.index_files import IndexSummary, check_indexed_dataset
from megatron_memory.data.indexed.format import bin_path
from megatron_memory.data.indexed.manifest import read_manifest
from megatron_memory.data.indexed.streaming import CHUNK, TokenStream
from megatron_memory.exceptions import DataError

_LARGEST_VOCABULARY = 1 << 26
# Longer documents are counted together, so that the counts of lengths stay small.
_LONGEST_COUNTED = 1 << 20


def verify(prefix: str, vocab_size: int | None = None) -> str:
    """Read a pair from end to end: every offset, every token id, and what its manifest says.

    Args:
        prefix: of the pair.
        vocab_size: ids must be below it; None takes the manifest's, if there is one.

    Returns:
        a line on what it holds.

    Raises:
        DataError: names the first fault.
    """
    pair = check_indexed_dataset(prefix)
    manifest = read_manifest(prefix) or {}
    _check_manifest(pair, manifest)
    if vocab_size is None:
        vocab_size = manifest.get("tokenizer", {}).get("vocab_size")
    smallest, largest, position = np.iinfo(np.int64).max, -1, 0
    with TokenStream(pair) as tokens:
        for piece in tokens.read(pair.num_tokens):
            smallest, largest = min(smallest, int(piece.min())), max(largest, int(piece.max()))
            if smallest < 0 or (vocab_size is not None and largest >= vocab_size):
                _raise_first_bad_id(pair, piece, position, vocab_size)
            position += piece.size
    limit = "no vocabulary size was given" if vocab_size is None else f"below {vocab_size:,}"
    return f"{pair}: sound; token ids from {smallest:,} to {largest:,} ({limit})"


def _check_manifest(pair: IndexSummary, manifest: dict) -> None:
    holds = {
        "documents": pair.num_documents,
        "sequences": pair.num_sequences,
        "tokens": pair.num_tokens,
        "dtype": pair.dtype.name,
    }
    for name, value in holds.items():
        if manifest.get(name, value) != value:
            raise DataError(
                f"{pair.prefix}: its manifest says {name} {manifest[name]}, but the files hold "
                f"{value}: they do not belong together. Preprocess again, or copy all three files"
            )


def _raise_first_bad_id(
    pair: IndexSummary, piece: np.ndarray, position: int, vocab_size: int | None
) -> None:
    bad = piece < 0 if vocab_size is None else (piece < 0) | (piece >= vocab_size)
    place = int(np.argmax(bad))
    sequence, end = 0, 0
    for begin in range(0, pair.num_sequences, CHUNK):
        ends = end + np.cumsum(pair.sequence_lengths[begin : begin + CHUNK], dtype=np.int64)
        sequence = begin + int(np.searchsorted(ends, position + place, side="right"))
        if sequence < begin + len(ends):
            break
        end = int(ends[-1])
    document = int(np.searchsorted(pair.document_bounds, sequence, side="right")) - 1
    limit = "at least 0" if vocab_size is None else f"from 0 to {vocab_size - 1}"
    raise DataError(
        f"{bin_path(pair.prefix)}: token {position + place} is {int(piece[place])}, in sequence "
        f"{sequence} of document {document}; ids must be {limit}. The data is of another "
        "tokenizer, or damaged"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Lengths and tokens of a pair."""

    pair: IndexSummary
    num_empty: int
    """Documents without tokens."""
    longest: int
    """Tokens of the longest document."""
    length_counts: np.ndarray
    """Documents by their number of tokens; the last entry counts all longer ones."""
    token_counts: np.ndarray
    """How often each id occurs, [largest id + 1]."""

    def length_quantile(self, share: float) -> int:
        """The shortest length that at least this share of the documents does not exceed."""
        sums = np.cumsum(self.length_counts)
        return int(np.searchsorted(sums, share * sums[-1]))

    def most_frequent(self, count: int) -> list[tuple[int, int]]:
        """Id and number of the most frequent tokens, descending."""
        order = np.argsort(-self.token_counts, kind="stable")[:count]
        return [(int(i), int(self.token_counts[i])) for i in order if self.token_counts[i]]

    def num_unused(self, vocab_size: int) -> int:
        """Ids below `vocab_size` that never occur."""
        return vocab_size - int(np.count_nonzero(self.token_counts[:vocab_size]))


def statistics(prefix: str) -> Statistics:
    """Count a pair's lengths and tokens, in one pass over it.

    Raises:
        DataError: the pair is damaged, or an id cannot be a token's.
    """
    pair = check_indexed_dataset(prefix)
    lengths, longest = np.zeros(_LONGEST_COUNTED + 1, np.int64), 0
    for piece in _document_lengths(pair):
        longest = max(longest, int(piece.max()))
        lengths += np.bincount(np.minimum(piece, _LONGEST_COUNTED), minlength=len(lengths))
    counts = np.zeros(1, np.int64)
    with TokenStream(pair) as tokens:
        for piece in tokens.read(pair.num_tokens):
            if int(piece.min()) < 0 or int(piece.max()) >= _LARGEST_VOCABULARY:
                raise DataError(
                    f"{tokens.path}: has ids from {piece.min()} to {piece.max()}, which are no "
                    "tokens. tools/dataset.py verify says where"
                )
            found = np.bincount(piece, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
    return Statistics(
        pair=pair,
        num_empty=int(lengths[0]),
        longest=longest,
        length_counts=lengths,
        token_counts=counts,
    )


def _document_lengths(pair: IndexSummary) -> Iterator[np.ndarray]:
    """Tokens of each document, [documents], in pieces of whole documents."""
    for begin in range(0, pair.num_documents, CHUNK):
        bounds = pair.document_bounds[begin : begin + CHUNK + 1]
        of_sequences = pair.sequence_lengths[int(bounds[0]) : int(bounds[-1])]
        sums = np.concatenate(([0], np.cumsum(of_sequences, dtype=np.int64)))
        yield np.diff(sums[bounds - bounds[0]])


def document(pair: IndexSummary, number: int) -> np.ndarray:
    """The token ids of one document, [tokens].

    Raises:
        DataError: the pair has no document of that number.
    """
    if not 0 <= number < pair.num_documents:
        raise DataError(
            f"{pair.prefix}: has no document {number}, only 0 to {pair.num_documents - 1}"
        )
    first, last = pair.document_bounds[number : number + 2].tolist()
    begin = sum(
        int(pair.sequence_lengths[start : min(first, start + CHUNK)].sum(dtype=np.int64))
        for start in range(0, first, CHUNK)
    )
    length = int(pair.sequence_lengths[first:last].sum(dtype=np.int64))
    offset = begin * pair.dtype.itemsize
    return np.fromfile(bin_path(pair.prefix), pair.dtype, length, offset=offset)
