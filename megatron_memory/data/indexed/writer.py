"""Writes `.bin`/`.idx` pairs that appear under their names only when they are complete.

What a pair will hold grows in three files beside its place: the token ids, the length of each
sequence, and the number of sequences of each document. The index is made of the latter two at the
end, in pieces: memory does not grow with the output, and a run can go on from any state on the way.
"""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from megatron_memory.data.indexed.format import (
    HEADER,
    MAGIC,
    VERSION,
    bin_path,
    dtype_code,
    idx_path,
)
from megatron_memory.data.indexed.manifest import manifest_path
from megatron_memory.exceptions import DataError

_CHUNK = 1 << 20
_BUFFER_BYTES = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How much of a pair is written."""

    num_tokens: int = 0
    num_sequences: int = 0
    num_documents: int = 0


class PairWriter:
    """One `.bin`/`.idx` pair, written beside its place. Whoever makes one holds its OutputLock."""

    def __init__(self, prefix: str, dtype: Any, extent: Extent | None = None) -> None:
        """
        Args:
            prefix: path of both files without their suffix.
            dtype: of the token ids.
            extent: go on from here with what an earlier process wrote; None begins anew.

        Raises:
            DataError: the earlier process wrote less than that.
        """
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.extent = extent or Extent()
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_partial_idx(prefix))
        self._tokens = _open_at(_partial_bin(prefix), self.extent.num_tokens * self.dtype.itemsize)
        self._lengths = _open_at(_partial_lengths(prefix), 4 * self.extent.num_sequences)
        self._documents = _open_at(_partial_documents(prefix), 4 * self.extent.num_documents)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents of one sequence each.

        An empty document has no sequence but keeps its place among the documents, as Megatron-LM
        writes it.

        Args:
            tokens: ids of all documents, one after the other, [tokens], of this pair's dtype.
            lengths: tokens of each document, [documents].
        """
        self.add_sequences(tokens, lengths[lengths > 0], lengths > 0)

    def add_sequences(
        self, tokens: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray
    ) -> None:
        """Append documents of several sequences.

        Args:
            tokens: ids, one after the other, [tokens], of this pair's dtype.
            lengths: tokens of each sequence, [sequences].
            sequences_per_document: [documents].
        """
        assert tokens.dtype == self.dtype, f"{tokens.dtype} for a pair of {self.dtype}"
        self._tokens.write(np.ascontiguousarray(tokens).data)
        self._lengths.write(lengths.astype(np.int32).data)
        self._documents.write(sequences_per_document.astype(np.int32).data)
        self.extent = Extent(
            num_tokens=self.extent.num_tokens + tokens.size,
            num_sequences=self.extent.num_sequences + lengths.size,
            num_documents=self.extent.num_documents + sequences_per_document.size,
        )

    def sync(self) -> None:
        """Bring all that was added to the disk."""
        for stream in self._streams():
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Write the index and bring everything to the disk; nothing has its final name yet."""
        self.sync()
        with open(_partial_idx(self.prefix), "wb", buffering=_BUFFER_BYTES) as stream:
            _write_index(stream, self.prefix, self.dtype, self.extent)
            stream.flush()
            os.fsync(stream.fileno())

    def publish(self, manifest: dict[str, Any] | None) -> None:
        """Give both files their names, after `finish`."""
        self.close()
        publish_pair(self.prefix, manifest)

    def close(self) -> None:
        """Leave what was added for another process to go on from."""
        for stream in self._streams():
            # On a full disk the last flush fails again; what was synced is all that counts.
            with contextlib.suppress(OSError):
                stream.close()

    def discard(self) -> None:
        """Remove what was written and is not published."""
        self.close()
        remove_partial(self.prefix)

    def _streams(self) -> tuple[BinaryIO, ...]:
        return self._tokens, self._lengths, self._documents


def publish_pair(prefix: str, manifest: dict[str, Any] | None) -> None:
    """Give a finished pair its names, and write its manifest.

    An older pair of that name disappears, index first, so that no crash leaves the index of one run
    beside the tokens of another. Can be repeated where a crash interrupted it.
    """
    if os.path.exists(_partial_bin(prefix)):
        for stale in (idx_path(prefix), manifest_path(prefix)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(stale)
        os.replace(_partial_bin(prefix), bin_path(prefix))
    if os.path.exists(_partial_idx(prefix)):
        os.replace(_partial_idx(prefix), idx_path(prefix))
    if manifest is not None:
        _write_manifest(prefix, json.dumps(manifest, indent=2) + "\n")
    remove_partial(prefix)


def has_partial(prefix: str) -> bool:
    """Whether an unfinished pair lies here."""
    return os.path.exists(_partial_bin(prefix))


def remove_partial(prefix: str) -> None:
    """Remove an unfinished pair."""
    paths = (_partial_bin, _partial_idx, _partial_lengths, _partial_documents, _partial_manifest)
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path(prefix))


def write_error(names: str, error: OSError) -> DataError:
    """What to say of an output that cannot be written."""
    if error.errno in _DISK_FULL:
        room = "Raise ulimit -f" if error.errno == errno.EFBIG else "Make room there"
        return DataError(
            f"{names}: cannot be written: {error.strerror}. Nothing that was there is changed. "
            f"{room}, or write the output elsewhere"
        )
    return DataError(f"{names}: cannot be written ({error})")


def _write_manifest(prefix: str, text: str) -> None:
    """Whole, or not at all."""
    temporary = _partial_manifest(prefix)
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, manifest_path(prefix))


def _partial_bin(prefix: str) -> str:
    return bin_path(prefix) + ".partial"


def _partial_idx(prefix: str) -> str:
    return idx_path(prefix) + ".partial"


def _partial_lengths(prefix: str) -> str:
    return f"{prefix}.lengths.partial"


def _partial_documents(prefix: str) -> str:
    return f"{prefix}.documents.partial"


def _partial_manifest(prefix: str) -> str:
    return manifest_path(prefix) + ".partial"


def _open_at(path: str, size: int) -> BinaryIO:
    """A file to append to, cut to `size` bytes.

    Raises:
        DataError: it has fewer, or is missing.
    """
    found = os.path.getsize(path) if size and os.path.exists(path) else 0
    if found < size:
        raise DataError(
            f"{path}: {found} bytes, where the interrupted run had written {size}. Remove the "
            "output's .journal and start over without --resume"
        )
    stream = open(path, "r+b" if size else "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
    stream.truncate(size)
    stream.seek(size)
    return stream


def _write_index(stream: BinaryIO, prefix: str, dtype: np.dtype, extent: Extent) -> None:
    header = HEADER.pack(
        MAGIC, VERSION, dtype_code(dtype), extent.num_sequences, extent.num_documents + 1
    )
    stream.write(header)
    for piece in _read_counts(_partial_lengths(prefix)):
        stream.write(piece.data)
    _write_sums(stream, _partial_lengths(prefix), lambda ends: ends * dtype.itemsize, last=False)
    _write_sums(stream, _partial_documents(prefix), lambda ends: ends, last=True)


def _write_sums(
    stream: BinaryIO, path: str, scale: Callable[[np.ndarray], np.ndarray], *, last: bool
) -> None:
    """For each count in a file the sum of those before it (int64), and with `last` that of all."""
    total = 0
    for piece in _read_counts(path):
        ends = total + np.cumsum(piece, dtype=np.int64)
        stream.write(scale(np.concatenate(([total], ends[:-1]))).data)
        total = int(ends[-1])
    if last:
        stream.write(scale(np.array([total], dtype=np.int64)).data)


def _read_counts(path: str) -> Iterator[np.ndarray]:
    with open(path, "rb") as stream:
        while (piece := np.fromfile(stream, np.int32, _CHUNK)).size:
            yield piece
