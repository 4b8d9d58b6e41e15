"""Stochastic gradient descent on rows."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from memory_kernels.optimizers import operators
from memory_kernels.optimizers.base import RowOptimizer


class RowSGD(RowOptimizer):
    """table -= lr * gradient: torch.optim.SGD without momentum or weight decay.

    See `RowOptimizer` for the arguments and for `step`.
    """

    def __init__(
        self,
        tables: Iterable[Any],
        lr: float = 1e-3,
        *,
        master: str | None = "exact",
        seed: int = 0,
    ) -> None:
        super().__init__(tables, dict(lr=lr), master, seed)

    def _step_table(self, number: int, gradient: list[Tensor], scale: Tensor | None) -> None:
        operators.row_sgd(
            **self._weights(number),
            gradient=gradient,
            scale=scale,
            lr=float(self.param_groups[number]["lr"]),
        )
