"""Checks of `.bin`/`.idx` pairs, so that damage is named before training and not by a crash in it.

An `.idx` file is a header of 34 bytes (magic, version, dtype code, number of sequences, number of
document bounds), then per sequence its length (int32), per sequence its byte offset in the `.bin`
(int64), then the document bounds (int64, counted in sequences, beginning with 0).
"""

import dataclasses
import os
import struct
import zlib

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, get_bin_path, get_idx_path

from megatron_memory.exceptions import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
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
        return _HEADER.size + 12 * self.num_sequences + 8 * self.num_bounds


def check_indexed_dataset(prefix: str) -> IndexSummary:
    """Check that a pair is complete and that every sequence lies inside its `.bin`.

    Reads the whole index once, in pieces, and of the `.bin` only its size.

    Args:
        prefix: path of both files without their suffix, as in `--data-path`.

    Raises:
        DataError: names the file, what is wrong with it and the mend.
    """
    idx_path, bin_path = get_idx_path(prefix), get_bin_path(prefix)
    idx_bytes, bin_bytes = _size(prefix, idx_path), _size(prefix, bin_path)
    header = _read_header(idx_path, idx_bytes)
    count = header.num_sequences
    index = np.memmap(idx_path, mode="r", dtype=np.uint8)
    lengths = np.frombuffer(index, np.int32, count, _HEADER.size)
    pointers = np.frombuffer(index, np.int64, count, _HEADER.size + lengths.nbytes)
    bounds = np.frombuffer(
        index, np.int64, header.num_bounds, _HEADER.size + lengths.nbytes + pointers.nbytes
    )
    num_tokens = _check_sequences(idx_path, bin_path, bin_bytes, header.dtype, lengths, pointers)
    _check_bounds(idx_path, bounds, count)
    return IndexSummary(
        prefix=prefix,
        dtype=header.dtype,
        num_documents=header.num_bounds - 1,
        num_tokens=num_tokens,
        sequence_lengths=lengths,
    )


def index_fingerprint(prefix: str) -> str:
    """Tells datasets of one name apart, cheaply: file sizes, both ends of the index and of the
    tokens."""
    parts = []
    for path in (get_idx_path(prefix), get_bin_path(prefix)):
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
                mend = f"Give the path without {suffix}: {prefix.removesuffix(suffix)}"
                break
        else:
            mend = (
                "--data-path takes the path that .bin and .idx share, such as "
                "OUTPUT_PREFIX_text_document; tools/preprocess_data.py makes both files"
            )
        raise DataError(f"{path}: cannot be read ({error.strerror}). {mend}") from error


def _read_header(path: str, num_bytes: int) -> _Header:
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not head.startswith(_MAGIC):
        raise DataError(f"{path}: not the index of a dataset (it does not begin as one). {_MEND}")
    if len(head) < _HEADER.size:
        raise DataError(f"{path}: cut off after {num_bytes} bytes, inside its header. {_MEND}")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(head)
    if version != _VERSION:
        raise DataError(f"{path}: has format version {version}, not {_VERSION}. {_MEND}")
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
    try:
        dtype = np.dtype(DType.dtype_from_code(code))
    except ValueError as error:
        raise DataError(f"{path}: unknown dtype code {code}. {_MEND}") from error
    if dtype.kind not in "iu":
        raise DataError(f"{path}: holds {dtype.name}, but token ids are whole numbers. {_MEND}")
    return dtype


def _check_sequences(
    idx_path: str,
    bin_path: str,
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
            raise DataError(f"{idx_path}: sequence {number} has a negative length. {_MEND}")
        ends = end + np.cumsum(piece, dtype=np.int64) * dtype.itemsize
        starts = np.concatenate(([end], ends[:-1]))
        wrong = pointers[begin : begin + _CHUNK] != starts
        if wrong.any():
            place = int(np.argmax(wrong))
            raise DataError(
                f"{idx_path}: sequence {begin + place} points at byte {pointers[begin + place]} of "
                f"the .bin, where {starts[place]} is due. {_MEND}"
            )
        end = int(ends[-1])
    if end > bin_bytes:
        raise DataError(
            f"{bin_path}: cut off: {bin_bytes} bytes, but {idx_path} points at {end}. {_MEND}"
        )
    if end < bin_bytes:
        raise DataError(
            f"{bin_path}: {bin_bytes} bytes, but {idx_path} describes {end}: the two do not belong "
            f"together. {_MEND}"
        )
    if end == 0:
        raise DataError(f"{bin_path}: holds no tokens. Preprocess a file that has text")
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
