"""Tables in fp8 (e4m3) with a scale a row, read by forward passes in a bf16 table's place.

Half the bytes of bf16 in the gather, which memory bandwidth bounds. The table itself stays the
master: optimizers update it and write the rows that they change to the shadow.

The scale of a row is its largest magnitude / 448, so that e4m3's range is used in full. Magnitudes
below 1e-30 count as that much, so that no scale or inverse leaves the range of fp32. NaN stays NaN
and leaves the rest of its row alone; an infinity makes its row NaN.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.choice import uses_triton
from memory_kernels.chunks import as_chunks, describe, num_rows

E4M3_MAX = 448.0
_LEAST_MAGNITUDE = 1e-30


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
            values=[
                torch.empty(chunk.shape, dtype=torch.float8_e4m3fn, device=chunk.device)
                for chunk in chunks
            ],
            scales=torch.empty(num_rows(chunks), dtype=torch.float32, device=chunks[0].device),
        )
        shadow.write(chunks)
        return shadow

    def write(self, table: Tensor | Sequence[Tensor]) -> None:
        """Write all rows of `table` to the shadow.

        Raises:
            ValueError: a table that is not cut as the shadow is.
        """
        chunks = [chunk.detach() for chunk in as_chunks(table)]
        self.check_cut(chunks)
        quantize_into(chunks, self.bytes(), self.scales)

    def tensors(self) -> list[Tensor]:
        """The values' chunks and last the scales, as the operators take them."""
        return [*self.values, self.scales]

    def bytes(self) -> list[Tensor]:
        """Views of the values' chunks as uint8: torch can do more with those than with fp8."""
        return [chunk.view(torch.uint8) for chunk in self.values]

    def check_cut(self, chunks: Sequence[Tensor]) -> None:
        """Raises ValueError unless the shadow has the chunks' shapes and device."""
        ours = [(tuple(chunk.shape), chunk.device) for chunk in self.values]
        theirs = [(tuple(chunk.shape), chunk.device) for chunk in chunks]
        if ours != theirs or len(self.scales) != num_rows(chunks):
            raise ValueError(
                f"shadow: values cut as the table is wanted, {[list(c.shape) for c in chunks]}, "
                f"got {[describe(chunk) for chunk in self.values]}; make it by Fp8Shadow.of(table)"
            )


@torch.library.custom_op("memory_kernels::quantize_rows", mutates_args={"values", "scales"})
def quantize_into(table: Sequence[Tensor], values: Sequence[Tensor], scales: Tensor) -> None:
    """Write all rows of the table's chunks to values (chunks of uint8) and scales [S] fp32."""
    if uses_triton(table[0]):
        from memory_kernels import shadow_triton  # needs triton, which not every machine has

        shadow_triton.plan_quantize_rows(list(table), list(values), scales, None, None).run()
        return
    first = 0
    for chunk, out in zip(table, values, strict=True):
        for rows, codes in zip(chunk.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
            quantized, of_rows = _quantize(rows)
            codes.copy_(quantized.view(torch.uint8))
            scales[first : first + len(rows)] = of_rows
            first += len(rows)


_ROWS_AT_ONCE = 1 << 16  # the fp32 copies of so many rows are small beside any table


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [R, D] as values [R, D] e4m3 and scales [R] fp32, rounded to the nearest."""
    shadow = Fp8Shadow.of(rows)
    return shadow.values[0], shadow.scales


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    values = rows.float()
    magnitudes = torch.where(values.isnan(), 0.0, values.abs())
    largest = magnitudes.amax(-1) if rows.shape[1] else values.new_zeros(len(rows))
    bounded = largest.clamp(min=_LEAST_MAGNITUDE)
    # Divisions of tensors, since torch has others for numbers, which round twice. And one
    # multiplication an element, rounded alike on every device.
    limit = torch.full_like(bounded, E4M3_MAX)
    scaled = values * (limit / bounded)[:, None]
    scales = torch.where(largest > 0, bounded / limit, 1.0)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize_rows(values: Tensor, scales: Tensor) -> Tensor:
    """values [R, D] e4m3 times scales [R]: [R, D] fp32."""
    return values.float() * scales[:, None]
