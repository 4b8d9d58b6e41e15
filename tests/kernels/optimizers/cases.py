"""Tables, and gradients that touch a few of their rows."""

import torch
from torch import Tensor

from memory_kernels import RowGradients
from tests.devices import TEST_DEVICE


def make_generator(seed: int = 0) -> torch.Generator:
    """Draws on the CPU, the same for every device."""
    return torch.Generator().manual_seed(seed)


def make_table(
    num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    """Values of order one on the device under test."""
    values = torch.randn(num_rows, num_columns, generator=make_generator(seed), dtype=torch.float64)
    return values.to(dtype).to(TEST_DEVICE)


def make_gradient(
    table: Tensor,
    num_read: int,
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    spare: int = 3,
) -> RowGradients:
    """num_read random rows, in buffers with room for `spare` more entries that hold NaN."""
    num_rows, num_columns = table.shape
    rows = torch.randperm(num_rows, generator=generator)[:num_read].sort().values
    sums = torch.randn(num_read, num_columns, generator=generator, dtype=torch.float64)
    if dtype is None:
        dtype = torch.promote_types(table.dtype, torch.float32)
    capacity = num_read + spare
    gradient = RowGradients(
        rows=torch.full((capacity,), num_rows - 1, dtype=torch.int64),
        gradients=torch.full((capacity, num_columns), torch.nan, dtype=dtype),
        squared_norms=torch.full((capacity,), torch.nan),
        num_rows=torch.zeros(1, dtype=torch.int32),
    )
    gradient.rows[:num_read] = rows
    gradient.gradients[:num_read] = sums.to(dtype)
    gradient.squared_norms[:num_read] = sums.square().sum(-1)
    gradient.num_rows.fill_(num_read)
    moved = [buffer.to(TEST_DEVICE) for buffer in gradient.buffers()]
    return RowGradients(**dict(zip(vars(gradient), moved, strict=True)))


def to_dense(gradient: RowGradients, table: Tensor) -> Tensor:
    """[S, D] in the gradient's dtype."""
    held = gradient.trimmed()
    dense = torch.zeros(table.shape, dtype=held.gradients.dtype, device=held.rows.device)
    dense[held.rows] = held.gradients
    return dense
