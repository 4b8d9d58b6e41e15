"""Pairs that are read and written in pieces, however large they are."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_memory.data.index_files import IndexSummary
from megatron_memory.data.indexed.format import bin_path
from megatron_memory.data.indexed.lock import OutputLock
from megatron_memory.data.indexed.writer import PairWriter, write_error
from megatron_memory.exceptions import DataError

CHUNK = 1 << 20
_NOTHING = np.empty(0, np.int32)


class TokenStream:
    """The token ids of a pair, from the first to the last."""

    def __init__(self, pair: IndexSummary) -> None:
        self.path = bin_path(pair.prefix)
        self.dtype = pair.dtype
        self._stream = open(self.path, "rb")  # noqa: SIM115

    def read(self, count: int) -> Iterator[np.ndarray]:
        """The next `count` ids, in pieces.

        Raises:
            DataError: the file has fewer: it changed since it was checked.
        """
        while count:
            piece = np.fromfile(self._stream, self.dtype, min(CHUNK, count))
            if not piece.size:
                raise DataError(f"{self.path}: became shorter while it was read")
            count -= piece.size
            yield piece

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()


def copy_documents(
    pair: IndexSummary, tokens: TokenStream, begin: int, end: int, writer: PairWriter
) -> None:
    """Append documents `begin` to `end` of a pair to another.

    Args:
        pair: to copy from.
        tokens: its ids, read up to document `begin`.
        begin, end: numbers of documents, the second of the first one not copied.
        writer: of the other pair. Ids are converted to its dtype.

    Raises:
        DataError: an id does not fit into the writer's dtype.
        OSError: the output cannot be written.
    """
    first, last = int(pair.document_bounds[begin]), int(pair.document_bounds[end])
    for start in range(first, last, CHUNK):
        lengths = pair.sequence_lengths[start : min(last, start + CHUNK)]
        writer.add_sequences(np.empty(0, writer.dtype), lengths, _NOTHING)
        for piece in tokens.read(int(lengths.sum(dtype=np.int64))):
            writer.add_sequences(_converted(piece, writer.dtype, tokens.path), _NOTHING, _NOTHING)
    for start in range(begin, end, CHUNK):
        bounds = pair.document_bounds[start : min(end, start + CHUNK) + 1]
        writer.add_sequences(np.empty(0, writer.dtype), _NOTHING, np.diff(bounds))


def _converted(tokens: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    if tokens.dtype == dtype:
        return tokens
    limits = np.iinfo(dtype)
    if int(tokens.min()) < limits.min or int(tokens.max()) > limits.max:
        raise DataError(
            f"{path}: has token ids from {tokens.min()} to {tokens.max()}, which {dtype.name} "
            "cannot hold. Give a larger --dtype"
        )
    return tokens.astype(dtype)


@contextlib.contextmanager
def new_pairs(
    prefixes: Sequence[str], dtype: np.dtype, inputs: Sequence[str]
) -> Iterator[list[PairWriter]]:
    """Writers of new pairs, locked; what is not published when the block ends is removed.

    Raises:
        DataError: another process writes one of them, one is an input too, or the disk is full.
    """
    taken = set(map(os.path.realpath, inputs))
    for prefix in prefixes:
        if os.path.realpath(prefix) in taken:
            raise DataError(
                f"{prefix}: is both read and written, or written twice. Name it otherwise"
            )
        taken.add(os.path.realpath(prefix))
    with contextlib.ExitStack() as stack:
        try:
            for prefix in prefixes:
                stack.enter_context(OutputLock(prefix))
            writers = []
            for prefix in prefixes:
                writers.append(PairWriter(prefix, dtype))
                stack.callback(writers[-1].discard)
            yield writers
        except OSError as error:
            raise write_error(", ".join(prefixes), error) from error
