"""The table's gradient as the rows that were read: for optimizers whose work follows the reads."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.chunks import as_chunks, describe, num_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowGradients:
    """Gradients of the rows that one call of `weighted_bag` or `row_dot` read.

    Buffers of a fixed capacity, made before the call and filled in its backward, so that nothing
    waits for the device: of the C entries the first `num_rows` hold, the others are undefined.
    """

    rows: Tensor
    """[C] int64: the rows read, ascending, each once."""
    gradients: Tensor
    """[C, D]: their gradients."""
    squared_norms: Tensor
    """[C] fp32: the squared norm of each gradient before it is rounded to its dtype."""
    num_rows: Tensor
    """[1] int32, on the device of the rest: how many entries hold; 0 before the backward."""

    @classmethod
    def empty(
        cls,
        table: Tensor | Sequence[Tensor],
        num_reads: int,
        dtype: torch.dtype = torch.float32,
    ) -> "RowGradients":
        """Buffers for a call that reads num_reads = T * B rows of `table`.

        No more than min(num_reads, S) rows can be read.
        """
        chunks = as_chunks(table)
        capacity = min(num_reads, num_rows(chunks))
        device = chunks[0].device
        return cls(
            rows=torch.empty(capacity, dtype=torch.int64, device=device),
            gradients=torch.empty(capacity, chunks[0].shape[1], dtype=dtype, device=device),
            squared_norms=torch.empty(capacity, dtype=torch.float32, device=device),
            num_rows=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def __repr__(self) -> str:
        """Shapes and dtypes: most of the values are undefined, and all of them too many."""
        gradients = describe(self.gradients)
        return f"RowGradients(gradients={gradients}, device={self.gradients.device})"

    def buffers(self) -> list[Tensor]:
        """rows, gradients, squared_norms, num_rows."""
        return [self.rows, self.gradients, self.squared_norms, self.num_rows]

    def trimmed(self) -> "RowGradients":
        """Views of the entries that hold; waits for the device."""
        count = int(self.num_rows)
        return RowGradients(
            rows=self.rows[:count],
            gradients=self.gradients[:count],
            squared_norms=self.squared_norms[:count],
            num_rows=self.num_rows,
        )

    def norm(self) -> Tensor:
        """The L2 norm of the whole gradient, a scalar on the device; nothing waits."""
        held = torch.arange(len(self.squared_norms), device=self.rows.device) < self.num_rows
        return torch.where(held, self.squared_norms, 0.0).sum().sqrt()

    def to_sparse(self, table: Tensor) -> Tensor:
        """A coalesced torch.sparse_coo tensor of the table's shape, as torch's SparseAdam takes it;
        waits for the device."""
        held = self.trimmed()
        return torch.sparse_coo_tensor(
            held.rows[None], held.gradients, table.shape, is_coalesced=True, check_invariants=False
        )


def fill(sink: Sequence[Tensor], first: int, rows: Tensor, sums: Tensor) -> None:
    """Write rows [R] and their gradients [R, D] to the buffers of a RowGradients, from entry
    `first` on; their number is the caller's to set."""
    out_rows, gradients, squared_norms, _ = sink
    part = slice(first, first + len(rows))
    out_rows[part] = rows
    gradients[part] = sums
    squared_norms[part] = sums.float().square().sum(-1)


def merge_row_gradients(parts: Sequence[RowGradients]) -> RowGradients:
    """The sum of several reads' gradients of one table (layers that share it, microbatches).

    Waits for the device. Sums are accumulated in fp32, in the order of the parts, and rounded to
    the first part's dtype.

    Raises:
        ValueError: no part.
    """
    if not parts:
        raise ValueError("row_gradients: one or more to be merged wanted, got none")
    if len(parts) == 1:
        return parts[0]
    held = [part.trimmed() for part in parts]
    # Numbered anew: the operator sorts in the least dtype that holds the rows of its table, which
    # is `gradients` here and not the one that the rows are of.
    rows, numbers = torch.cat([part.rows for part in held]).unique(return_inverse=True)
    gradients = torch.cat([part.gradients for part in held])
    dtype = parts[0].gradients.dtype
    merged = RowGradients.empty(gradients, len(numbers), dtype)
    # A bag of one row a token is the same sum: each token is a row of a part.
    ones = torch.ones(len(numbers), 1, dtype=torch.float32, device=rows.device)
    torch.ops.memory_kernels.bag_backward(
        [gradients], numbers[:, None], ones, gradients, [], "rows", merged.buffers(), False
    )
    merged.rows[: len(rows)] = rows
    return merged
