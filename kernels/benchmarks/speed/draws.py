"""Random inputs, made on the device that measures."""

import math

import torch
from torch import Tensor

DISTRIBUTIONS = ("uniform", "zipf")
_SCATTER = 0x9E3779B1  # odd: times it, modulo a power of two, is a bijection


def draw_indices(
    distribution: str, tokens: int, bag: int, rows: int, device: torch.device
) -> Tensor:
    """[T, B] int32 below `rows`.

    `zipf`: the r-th most popular row is read in proportion to 1 / r, so that of a million rows one
    has 5% of the reads and a thousand have half; popular rows lie far apart. Needs rows to be a
    power of two.
    """
    if distribution == "uniform":
        return torch.randint(rows, (tokens, bag), dtype=torch.int32, device=device)
    if rows & (rows - 1):
        raise ValueError(f"rows: a power of two wanted for the Zipf distribution, got {rows}")
    # The logarithm of the rank is uniform.
    exponent = torch.rand(tokens, bag, dtype=torch.float64, device=device) * math.log(rows + 1)
    rank = exponent.exp().long().clamp(1, rows) - 1
    return (rank * _SCATTER % rows).int()


def random_table(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] of N(0, 0.1)."""
    table = torch.empty(rows, columns, dtype=dtype, device=device)
    for piece in table.split(1 << 20):  # nothing of the table's size stands beside it
        piece.normal_(0.0, 0.1)
    return table
