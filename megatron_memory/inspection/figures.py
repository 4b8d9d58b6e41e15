"""What a tensor's numbers are like, found block by block."""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_memory.conversion.lazy import LazyTensor

_SLICE = 2**18
_TABLE = re.compile(r"(.*\.)?values(_[uv])?\.weight")
_KEYS = re.compile(r"(.*\.)?(router|feed_forward)\.keys")
_TINY = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Of a tensor. Norm, mean and extremes are of its finite numbers, summed in fp64."""

    norm: float
    mean: float
    lowest: float
    highest: float
    num_zeros: int
    num_nan: int
    num_infinite: int
    is_constant: bool
    """Whether all elements are one number."""
    digest: str | None
    """Of its bytes; None where it was not asked for."""
    num_zero_rows: int | None
    """Of a value table."""
    num_repeated_rows: int | None
    """Of a value table: rows, not zero, that are byte for byte as another one before them."""
    num_tiny_keys: int | None
    """Of a memory's keys: half-keys with less than a thousandth of the median norm."""

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.lowest), abs(self.highest))


def is_table(name: str) -> bool:
    """Whether a tensor has a row for each slot of a memory."""
    return _TABLE.fullmatch(name) is not None


def figures_of(
    name: str,
    tensor: LazyTensor,
    *,
    with_digest: bool,
    on_read: Callable[[int], object] = lambda count: None,
) -> Figures:
    """Read a tensor and sum it up, in memory of a block; of a table 8 bytes a row more.

    Args:
        name: tells tables and keys.
        tensor: to read.
        with_digest: whether to hash it.
        on_read: called with the bytes of each block.

    Raises:
        CheckpointError: it cannot be read.
    """
    numbers, digest = _Numbers(), hashlib.blake2b(digest_size=16) if with_digest else None
    rows = _Rows() if is_table(name) and len(tensor.shape) == 2 else None
    key_norms: list[Tensor] | None = [] if _KEYS.fullmatch(name) else None
    for begin, end in tensor.blocks():
        block = tensor.read_rows(begin, end)
        on_read(block.nbytes)
        for part in block.reshape(-1).split(_SLICE):
            numbers.add(part)
        if digest is not None:
            digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if rows is not None:
            rows.add(block)
        if key_norms is not None:
            key_norms.append(torch.linalg.vector_norm(block, dim=-1, dtype=torch.float32).flatten())
    return Figures(
        **numbers.figures(),
        digest=digest.hexdigest() if digest is not None else None,
        num_zero_rows=rows.num_zero if rows is not None else None,
        num_repeated_rows=rows.num_repeated() if rows is not None else None,
        num_tiny_keys=_num_tiny(key_norms) if key_norms else None,
    )


def _num_tiny(norms: list[Tensor]) -> int:
    joined = torch.cat(norms)
    return int((joined < _TINY * joined.median()).sum()) if joined.numel() else 0


class _Numbers:
    """Sums over the finite elements, and counts of the others."""

    def __init__(self) -> None:
        self.count = self.zeros = self.nan = self.infinite = 0
        self.squares = self.total = 0.0
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, part: Tensor) -> None:
        x = part.float() if part.is_floating_point() and part.itemsize < 4 else part
        x = x if x.is_floating_point() else x.double()
        self.count += x.numel()
        if not x.numel():
            return
        lowest, highest = torch.aminmax(x)
        if not (lowest.isfinite() and highest.isfinite()):
            self.nan += int(x.isnan().sum())
            self.infinite += int(x.isinf().sum())
            x = x[x.isfinite()]
            if not x.numel():
                return
            lowest, highest = torch.aminmax(x)
        self.lowest = min(self.lowest, lowest.item())
        self.highest = max(self.highest, highest.item())
        self.zeros += x.numel() - int(np.count_nonzero(x.numpy()))
        exact = x.double()
        self.squares += torch.dot(exact, exact).item()
        self.total += exact.sum().item()

    def figures(self) -> dict:
        finite = self.count - self.nan - self.infinite
        return dict(
            norm=math.sqrt(self.squares),
            mean=self.total / finite if finite else 0.0,
            lowest=self.lowest if finite else 0.0,
            highest=self.highest if finite else 0.0,
            num_zeros=self.zeros,
            num_nan=self.nan,
            num_infinite=self.infinite,
            is_constant=finite == self.count and self.lowest == self.highest,
        )


class _Rows:
    """Rows that are zero, and a hash of 64 bits of each other row.

    Two of 2^26 different rows have one hash in one of 10,000 tables.
    """

    def __init__(self) -> None:
        self.num_zero = 0
        self._hashes: list[np.ndarray] = []

    def add(self, block: Tensor) -> None:
        width = max(1, block.shape[1] * block.itemsize)
        zero = hash(bytes(width))
        for rows in block.contiguous().split(max(1, _SLICE // max(1, block.shape[1]))):
            data = rows.view(torch.uint8).numpy().tobytes()
            # Python's own: several times as fast as tensor operations without 64-bit products.
            hashes = [hash(data[i : i + width]) for i in range(0, len(data), width)]
            found = np.array(hashes, dtype=np.int64)
            self._hashes.append(found[found != zero])
            self.num_zero += int((found == zero).sum())

    def num_repeated(self) -> int:
        hashes = np.concatenate([np.empty(0, dtype=np.int64), *self._hashes])
        return hashes.size - np.unique(hashes).size
