"""Tables in fp8 (e4m3) with a scale a row, read by forward passes in a bf16 table's place.

Half the bytes of bf16 in the gather, which memory bandwidth bounds. The table itself stays the
master: optimizers update it and write the rows that they change to the shadow.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.chunks import as_chunks, num_rows

E4M3_MAX = 448.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Shadow:
    """A table's values in fp8: row r is values[r] * scales[r]."""

    values: list[Tensor]
    """Chunks of [S, D], torch.float8_e4m3fn, cut as the table is."""
    scales: Tensor
    """[S] fp32: the row's largest magnitude / 448; 1 for a row of zeros."""

    @classmethod
    def of(cls, table: Tensor | Sequence[Tensor]) -> "Fp8Shadow":
        """A shadow of all rows of `table`."""
        chunks = as_chunks(table)
        shadow = cls(
            values=[torch.empty_like(chunk, dtype=torch.float8_e4m3fn) for chunk in chunks],
            scales=torch.empty(num_rows(chunks), dtype=torch.float32, device=chunks[0].device),
        )
        shadow.write(chunks)
        return shadow

    def write(self, table: Tensor | Sequence[Tensor]) -> None:
        """Write all rows of `table` to the shadow."""
        first = 0
        for chunk, values in zip(as_chunks(table), self.values, strict=True):
            scales = self.scales[first : first + len(chunk)]
            for rows in torch.arange(len(chunk)).split(_ROWS_AT_ONCE):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                values[part], scales[part] = quantize_rows(chunk[part])
            first += len(chunk)

    def tensors(self) -> list[Tensor]:
        """The values' chunks and last the scales, as the operators take them."""
        return [*self.values, self.scales]


_ROWS_AT_ONCE = 1 << 16  # the fp32 copies of so many rows are small beside any table


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, D] as values [R, D] e4m3 and scales [R] fp32, rounded to the nearest."""
    values = rows.float()
    largest = values.abs().amax(-1) if rows.shape[1] else values.new_zeros(len(rows))
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    return (values / scales[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize_rows(values: Tensor, scales: Tensor) -> Tensor:
    """values [R, D] e4m3 times scales [R]: [R, D] fp32."""
    return values.float() * scales[:, None]
