"""Tables in fp8 (e4m3) with a scale a row, read by forward passes in a bf16 table's place.

Half the bytes of bf16 in the gather, which memory bandwidth bounds. The table itself stays the
master: optimizers update it and write the rows that they change to the shadow.

The scale of a row is the least power of two (from 2^-126 on) with which its largest magnitude fits
e4m3's 448. Dividing by a power of two is exact, so that values are rounded once and alike on every
device; a floating point format loses nothing by it. NaN and infinities become NaN and leave the
rest of their row alone.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.choice import uses_triton
from memory_kernels.chunks import as_chunks, describe, num_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Shadow:
    """A table's values in fp8: row r is values[r] * scales[r]."""

    values: list[Tensor]
    """Chunks of [S, D], torch.float8_e4m3fn, cut as the table is."""
    scales: Tensor
    """[S] fp32: the least power of two that the row's largest magnitude is 448 times of or less; 1
    for a row of zeros."""

    def __post_init__(self) -> None:
        """Kernels write rows at addresses that follow from the shapes alone."""
        for tensor, dtype in (
            *((chunk, torch.float8_e4m3fn) for chunk in self.values),
            (self.scales, torch.float32),
        ):
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"shadow: contiguous values in {torch.float8_e4m3fn} and scales in "
                    f"{torch.float32} wanted, got {describe(tensor)} of strides {tensor.stride()}"
                )

    def __repr__(self) -> str:
        """Shapes and dtypes: the values are too many."""
        values = ", ".join(map(describe, self.values))
        return f"Fp8Shadow(values=[{values}], scales={describe(self.scales)})"

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
    magnitudes = torch.where(values.isfinite(), values.abs(), 0.0)
    largest = magnitudes.amax(-1) if rows.shape[1] else values.new_zeros(len(rows))
    # The biased exponent of `largest`, one more if its fraction exceeds that of 448 = 1.75 * 2^8.
    exponent = ((largest.view(torch.int32) + 0x1FFFFF) >> 23).clamp(min=9)
    inverse = ((262 - exponent) << 23).view(torch.float32)
    scales = torch.where(largest > 0, ((exponent - 8) << 23).view(torch.float32), 1.0)
    scaled = torch.where(values.isfinite(), values * inverse[:, None], torch.nan)
    return scaled.to(torch.float8_e4m3fn), scales


def dequantize_rows(values: Tensor, scales: Tensor) -> Tensor:
    """values [R, D] e4m3 times scales [R]: [R, D] fp32."""
    return values.float() * scales[:, None]
