"""Checks of `.bin`/`.idx` pairs, so that damage is named before training, not by a crash in it."""

import dataclasses
import os
import zlib

import numpy as np

from megatron_memory.data.indexed.format import (
    FLOAT_DTYPES,
    HEADER,
    MAGIC,
    TOKEN_DTYPES,
    VERSION,
    bin_path,
    idx_path,
)
from megatron_memory.exceptions import DataError
from megatron_memory.reading.documents import open_regular
from megatron_memory.reading.pickles import UnsafeFile

_CHUNK = 1 << 20
_MEND = "Make the pair again with tools/preprocess_data.py, or copy both files again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexSummary:
    """A sound `.bin`/`.idx` pair."""

    prefix: str
    """Both paths without their suffix."""
    dtype: np.dtype
    """Of the token ids."""
    num_documents: int
    num_tokens: int
    sequence_lengths: np.ndarray
    """Tokens of each sequence, [sequences], int32, mapped from the file."""
    document_bounds: np.ndarray
    """Number of each document's first sequence, and then of all sequences, [documents + 1], int64,
    mapped from the file."""

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_lengths)

    def __str__(self) -> str:
        return (
            f"{self.prefix}: {self.num_documents:,} documents, {self.num_tokens:,} tokens "
            f"({self.dtype.name})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Header:
    dtype: np.dtype
    num_sequences: int
    num_bounds: int

    @property
    def bytes_expected(self) -> int:
        return HEADER.size + 12 * self.num_sequences + 8 * self.num_bounds


def check_indexed_dataset(prefix: str) -> IndexSummary:
    """Check that a pair is complete and that every sequence lies inside its `.bin`.

    Reads the whole index once, in pieces, and of the `.bin` only its size.

    Args:
        prefix: path of both files without their suffix, as in `--data-path`.

    Raises:
        DataError: names the file, what is wrong with it and the fix.
    """
    index_file, token_file = idx_path(prefix), bin_path(prefix)
    idx_bytes, bin_bytes = _size(prefix, index_file), _size(prefix, token_file)
    header = _read_header(index_file, idx_bytes)
    count = header.num_sequences
    index = np.memmap(index_file, mode="r", dtype=np.uint8)
    lengths = np.frombuffer(index, np.int32, count, HEADER.size)
    pointers = np.frombuffer(index, np.int64, count, HEADER.size + lengths.nbytes)
    bounds = np.frombuffer(
        index, np.int64, header.num_bounds, HEADER.size + lengths.nbytes + pointers.nbytes
    )
    num_tokens = _check_sequences(
        index_file, token_file, bin_bytes, header.dtype, lengths, pointers
    )
    _check_bounds(index_file, bounds, count)
    return IndexSummary(
        prefix=prefix,
        dtype=header.dtype,
        num_documents=header.num_bounds - 1,
        num_tokens=num_tokens,
        sequence_lengths=lengths,
        document_bounds=bounds,
    )


def index_fingerprint(prefix: str) -> str:
    """Tells datasets of one name apart, cheaply: file sizes, both ends of the index and of the
    tokens."""
    parts = []
    for path in (idx_path(prefix), bin_path(prefix)):
        num_bytes = _size(prefix, path)
        with open(path, "rb") as stream:
            checksum = zlib.crc32(stream.read(_CHUNK))
            stream.seek(max(0, num_bytes - _CHUNK))
            checksum = zlib.crc32(stream.read(_CHUNK), checksum)
        parts.append(f"{num_bytes}-{checksum:08x}")
    return "-".join(parts)


def _size(prefix: str, path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        for suffix in (".bin", ".idx"):
            if prefix.endswith(suffix) and os.path.exists(prefix):
                fix = f"Give the path without {suffix}: {prefix.removesuffix(suffix)}"
                break
        else:
            fix = (
                "--data-path takes the path that .bin and .idx share, such as "
                "OUTPUT_PREFIX_text_document; tools/preprocess_data.py makes both files"
            )
        raise DataError(f"{path}: cannot be read ({error.strerror}). {fix}") from error


def _read_header(path: str, num_bytes: int) -> _Header:
    try:
        with open_regular(path) as stream:
            head = stream.read(HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnsafeFile as error:
        raise DataError(f"{path}: cannot be read ({error}). {_MEND}") from error
    if not head.startswith(MAGIC):
        raise DataError(f"{path}: not the index of a dataset (it does not begin as one). {_MEND}")
    if len(head) < HEADER.size:
        raise DataError(f"{path}: cut off after {num_bytes} bytes, inside its header. {_MEND}")
    _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
    if version != VERSION:
        raise DataError(f"{path}: has format version {version}, not {VERSION}. {_MEND}")
    header = _Header(
        dtype=_token_dtype(path, code), num_sequences=num_sequences, num_bounds=num_bounds
    )
    if num_bytes < header.bytes_expected:
        raise DataError(
            f"{path}: cut off: {num_bytes} bytes, where {num_sequences} sequences and {num_bounds} "
            f"document bounds need {header.bytes_expected}. {_MEND}"
        )
    if num_bytes > header.bytes_expected:
        raise DataError(
            f"{path}: {num_bytes} bytes, where {num_sequences} sequences and {num_bounds} document "
            f"bounds need {header.bytes_expected}; a multimodal index is not text. {_MEND}"
        )
    if num_sequences == 0:
        raise DataError(f"{path}: holds no sequences. Preprocess a file that has documents")
    if num_bounds < 2:
        raise DataError(f"{path}: holds {num_bounds} document bounds, but at least 2. {_MEND}")
    return header


def _token_dtype(path: str, code: int) -> np.dtype:
    if code in FLOAT_DTYPES:
        raise DataError(
            f"{path}: holds {FLOAT_DTYPES[code].name}, but token ids are whole numbers. {_MEND}"
        )
    if code not in TOKEN_DTYPES:
        raise DataError(f"{path}: unknown dtype code {code}. {_MEND}")
    return TOKEN_DTYPES[code]


def _check_sequences(
    index_file: str,
    token_file: str,
    bin_bytes: int,
    dtype: np.dtype,
    lengths: np.ndarray,
    pointers: np.ndarray,
) -> int:
    """Each sequence must begin where the one before it ends, and the last end with the `.bin`."""
    end = 0
    for begin in range(0, len(lengths), _CHUNK):
        piece = lengths[begin : begin + _CHUNK]
        if piece.min() < 0:
            number = begin + int(np.argmax(piece < 0))
            raise DataError(f"{index_file}: sequence {number} has a negative length. {_MEND}")
        ends = end + np.cumsum(piece, dtype=np.int64) * dtype.itemsize
        starts = np.concatenate(([end], ends[:-1]))
        wrong = pointers[begin : begin + _CHUNK] != starts
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DataError(
                f"{index_file}: sequence {begin + place} points at byte {pointers[begin + place]} "
                f"of the .bin, where {starts[place]} is due. {_MEND}"
            )
        end = int(ends[-1])
    if end > bin_bytes:
        raise DataError(
            f"{token_file}: cut off: {bin_bytes} bytes, but {index_file} points at {end}. {_MEND}"
        )
    if end < bin_bytes:
        raise DataError(
            f"{token_file}: {bin_bytes} bytes, but {index_file} describes {end}: the two do not "
            f"belong together. {_MEND}"
        )
    if end == 0:
        raise DataError(f"{token_file}: holds no tokens. Preprocess a file that has text")
    return end // dtype.itemsize


def _check_bounds(path: str, bounds: np.ndarray, num_sequences: int) -> None:
    for begin in range(0, len(bounds), _CHUNK):
        # One entry of overlap, so that the step between two pieces is looked at too.
        if (np.diff(bounds[begin : begin + _CHUNK + 1]) < 0).any():
            raise DataError(f"{path}: its document bounds are out of order. {_MEND}")
    if bounds[0] != 0 or bounds[-1] != num_sequences:
        raise DataError(
            f"{path}: its document bounds go from {bounds[0]} to {bounds[-1]}, but must go from 0 "
            f"to {num_sequences}. {_MEND}"
        )
