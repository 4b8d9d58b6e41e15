"""Adagrad on rows, with a sum of squares for each element or for each row."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from memory_kernels.optimizers import operators
from memory_kernels.optimizers.base import RowOptimizer


class RowAdagrad(RowOptimizer):
    """sums += gradient^2; table -= lr * gradient / (sqrt(sums) + eps).

    torch.optim.Adagrad without decay of learning rate or weights: rows that are not read have a
    gradient of zero and would not change in it either. The sums are fp32. See `RowOptimizer` for
    the other arguments and for `step`.
    """

    _operator = staticmethod(operators.row_adagrad)

    def __init__(
        self,
        tables: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        *,
        master: str | None = "exact",
        seed: int = 0,
    ) -> None:
        if not initial_accumulator_value >= 0.0:
            raise ValueError(
                f"initial_accumulator_value: 0 or more wanted, got {initial_accumulator_value}"
            )
        self._initial_value = initial_accumulator_value
        super().__init__(tables, dict(lr=lr, eps=eps), master, seed)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_initial_value": self._initial_value}

    def _initial_state(self, chunk: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        sums = torch.full(
            self._shape_of_sums(chunk),
            self._initial_value,
            dtype=torch.promote_types(chunk.dtype, torch.float32),
            device=chunk.device,
        )
        return {**super()._initial_state(chunk, group), "sum": sums}

    def _shape_of_sums(self, chunk: Tensor) -> tuple[int, ...]:
        return tuple(chunk.shape)

    def _step_table(self, number: int, gradient: list[Tensor], scale: Tensor | None) -> None:
        group = self.param_groups[number]
        self._operator(
            **self._weights(number),
            gradient=gradient,
            scale=scale,
            sums=self._states(number, "sum"),
            lr=float(group["lr"]),
            eps=float(group["eps"]),
        )


class RowWiseAdagrad(RowAdagrad):
    """Adagrad with one sum a row: sums[r] += mean over columns of gradient[r]^2.

    The row-wise Adagrad of FBGEMM and TorchRec. The state takes 4 bytes a row.
    """

    _operator = staticmethod(operators.row_wise_adagrad)

    def _shape_of_sums(self, chunk: Tensor) -> tuple[int, ...]:
        return (len(chunk),)
