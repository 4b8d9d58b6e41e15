"""Table rows as fp32 for an update, and back, on torch operators. See precision.py."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memory_kernels.chunks import rows_by_chunk
from memory_kernels.optimizers.precision import join_master, round_stochastically, split_master
from memory_kernels.shadow import quantize_rows


@dataclasses.dataclass(frozen=True)
class Weights:
    """The operands of every update operator (operators.py) that make a table."""

    table: Sequence[Tensor]
    remainder: Sequence[Tensor]
    shadow: Sequence[Tensor]
    rounding: str
    seed: int
    step: int

    def update(self, rows: Tensor, change: Callable[[Tensor, int, Tensor, slice], None]) -> None:
        """Change rows [R], ascending, each once.

        Args:
            change: called for each chunk with the rows' weights in fp32 (fp64 for an fp64 table),
                to be changed in place, the chunk's number, the rows counted from its first, and the
                slice of `rows` that they are.
        """
        for number, (_, local, part) in enumerate(rows_by_chunk(self.table, rows)):
            weights = self._read(number, local)
            change(weights, number, local, part)
            self._write(number, local, rows[part], weights)

    def _read(self, number: int, local: Tensor) -> Tensor:
        values = self.table[number][local]
        if self.rounding == "exact":
            return join_master(values, self.remainder[number][local])
        return values.to(torch.promote_types(values.dtype, torch.float32))

    def _write(self, number: int, local: Tensor, rows: Tensor, weights: Tensor) -> None:
        chunk = self.table[number]
        if self.rounding == "exact":
            values, self.remainder[number][local] = split_master(weights)
        elif self.rounding == "stochastic":
            values = round_stochastically(weights, self.seed, self.step, rows)
        else:
            values = weights.to(chunk.dtype)
        chunk[local] = values
        if self.shadow and len(rows):
            codes, scales = quantize_rows(values)
            self.shadow[number][local] = codes.view(torch.uint8)
            self.shadow[-1][rows] = scales
