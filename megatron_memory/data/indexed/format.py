"""The format of Megatron's `.bin`/`.idx` pairs.

The `.bin` is the token ids, one sequence after the other. The `.idx` is a header of 34 bytes
(magic, version, dtype code, number of sequences, number of document bounds), then per sequence its
length (int32), per sequence its byte offset in the `.bin` (int64), then the document bounds (int64,
counted in sequences, beginning with 0).
"""

import os
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")

TOKEN_DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    8: np.dtype(np.uint16),
}
"""Dtype codes of token ids."""
FLOAT_DTYPES: dict[int, np.dtype] = {6: np.dtype(np.float64), 7: np.dtype(np.float32)}
"""Codes that the format has besides, and that no token ids use."""


def bin_path(prefix: str) -> str:
    """Where the token ids of a pair are."""
    return prefix + ".bin"


def idx_path(prefix: str) -> str:
    """Where the index of a pair is."""
    return prefix + ".idx"


def dtype_code(dtype: Any) -> int:
    """The code of a dtype of TOKEN_DTYPES.

    Raises:
        KeyError: the format has no such token ids.
    """
    return {known: code for code, known in TOKEN_DTYPES.items()}[np.dtype(dtype)]


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron-LM writes the ids of so many tokens."""
    # Megatron's border, some way below 2^16.
    return np.dtype(np.uint16) if vocab_size < 65500 else np.dtype(np.int32)


def named_twice(prefixes: Sequence[str]) -> str | None:
    """The first prefix whose pair is there again, by whatever name; None if all differ."""
    files = [os.path.realpath(bin_path(prefix)) for prefix in prefixes]
    return next((p for p, f in zip(prefixes, files, strict=True) if files.count(f) > 1), None)
