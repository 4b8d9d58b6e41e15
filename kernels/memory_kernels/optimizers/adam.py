"""AdamW on rows, equal to AdamW on the whole table.

In AdamW a row goes on moving in steps that do not read it: its momentum and the weight decay carry
it. `RowAdam` leaves such a row alone and makes up for the n steps it missed before the row is read
next, with the learning rate and the bias corrections that each of those steps had. With m and v the
row's moments after the last step s that it saw, step s + j would have been

    m_j = beta1^j m,   v_j = beta2^j v
    p_j = decay_j p_(j-1) - a_j m_j / (c_j sqrt(v_j) + eps)

with decay_j = 1 - lr_j * weight_decay, a_j = lr_j / (1 - beta1^(s+j)) and
c_j = 1 / sqrt(1 - beta2^(s+j)). A device history has (decay, a, c, sum of log decay) of every step.
The first K missed steps are gone through one by one by just this formula. After them only the decay
is left, which is one product: exp of a difference of the sums of logarithms.

**What is left out** are the moves by momentum in missed steps after the K-th. With
rho = beta1 / sqrt(beta2), move j is at most a_j rho^j |m| / sqrt(v), as c_j >= 1 and eps >= 0. K is
the least number with rho^K / (1 - rho) <= 2^-24, so that all moves left out sum to less than
2^-24 * max a * |m| / sqrt(v): half a unit in the last place, in fp32, of the size of one step.
For betas (0.9, 0.999) K is 181, for (0.9, 0.95) it is 241. With rho >= 1 nothing is left out. Rows
whose m is zero throughout, as those never read, have no such moves: their loop is empty.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memory_kernels.checks import check_device, check_in_table, check_type
from memory_kernels.chunks import num_rows
from memory_kernels.optimizers import operators
from memory_kernels.optimizers.base import RowOptimizer

_EVERY_STEP = 2**31 - 1
_FIRST_CAPACITY = 1024
_MOMENT_DTYPES = (torch.float32, torch.bfloat16)


class RowAdam(RowOptimizer):
    """torch.optim.AdamW for tables of which a step reads few rows.

    Call `prepare` with the indices before the forward that reads them, and `flush` before the table
    is saved or evaluated. Without `prepare` a forward reads rows as they were when last read (which
    is what lazy optimizers such as torch.optim.SparseAdam do for good); `step` catches up in any
    case. `lr` and `weight_decay` may change from step to step; `betas` and `eps` may not.

    Args:
        moments_dtype: torch.float32 or torch.bfloat16, of both moments.

    See `RowOptimizer` for the other arguments and for `step`. The step's cost follows the rows
    read, the catch-up's the rows read and the steps they missed, up to the K of adam.py.
    """

    def __init__(
        self,
        tables: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        master: str | None = "exact",
        moments_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        if moments_dtype not in _MOMENT_DTYPES:
            raise ValueError(f"moments_dtype: fp32 or bf16 wanted, got {moments_dtype}")
        self._moments_dtype = moments_dtype
        self._constants: list[tuple[float, float, float]] = []
        defaults = dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
        super().__init__(tables, defaults, master, seed)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_moments_dtype", "_constants")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        if not all(0.0 <= beta < 1.0 for beta in options["betas"]) or options["betas"][1] == 0.0:
            raise ValueError(f"betas: in [0, 1), the second above 0 wanted, got {options['betas']}")
        _decay(options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a table; the group is a dict as in the constructor."""
        super().add_param_group(param_group)
        self._constants.append(_constants(self.param_groups[-1]))
        first = self.param_groups[-1]["params"][0]
        # Entry 0 is for the state before the first step.
        self.state[first]["history"] = torch.zeros(
            _FIRST_CAPACITY, 4, dtype=torch.float64, device=first.device
        )
        self.state[first]["log_decay"] = torch.zeros((), dtype=torch.float64)

    def _initial_state(self, chunk: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        dtype = self._moments_dtype if chunk.dtype != torch.float64 else torch.float64
        return {
            **super()._initial_state(chunk, group),
            "exp_avg": torch.zeros(chunk.shape, dtype=dtype, device=chunk.device),
            "exp_avg_sq": torch.zeros(chunk.shape, dtype=dtype, device=chunk.device),
            "last_step": torch.zeros(len(chunk), dtype=torch.int32, device=chunk.device),
        }

    @torch.no_grad()
    def prepare(self, indices: Tensor | Sequence[Tensor | None]) -> None:
        """Catch up the rows that are about to be read. Nothing waits for the device on Triton.

        Args:
            indices: for each table the rows, of any shape, int32 or int64, in any order and
                repeated or not; None if none. One table's may stand alone.

        Raises:
            ValueError: not a tensor on the table's device for each table.
            IndexError: on the CPU, indices outside the table.
        """
        for number, rows in enumerate(self._for_tables("indices", indices)):
            if rows is None:
                continue
            chunks = self.param_groups[number]["params"]
            check_type("indices", rows, Tensor)
            check_device("indices", rows, chunks[0])
            check_in_table("indices", rows, num_rows(chunks))
            if rows.numel():
                self._catch_up(number, rows.reshape(-1).long())

    @torch.no_grad()
    def flush(self) -> None:
        """Catch up all rows of all tables."""
        for number in range(len(self.param_groups)):
            self._catch_up(number, None)

    def _catch_up(self, number: int, rows: Tensor | None) -> None:
        if self.param_groups[number]["step"] > 0:
            operators.row_adam_catch_up(
                **self._weights(number), rows=rows, **self._adam_operands(number)
            )

    def _step_table(self, number: int, gradient: list[Tensor], scale: Tensor | None) -> None:
        operators.row_adam(
            **self._weights(number), gradient=gradient, scale=scale, **self._adam_operands(number)
        )

    def _adam_operands(self, number: int) -> dict[str, Any]:
        beta1, beta2, eps = self._constants[number]
        return dict(
            exp_avg=self._states(number, "exp_avg"),
            exp_avg_sq=self._states(number, "exp_avg_sq"),
            last_step=self._states(number, "last_step"),
            history=self.state[self.param_groups[number]["params"][0]]["history"],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            looped_steps=looped_steps(beta1, beta2),
        )

    def _before_step(self, group: dict[str, Any]) -> None:
        """Enter the step's scalars in the history."""
        first = group["params"][0]
        state, step = self.state[first], group["step"]
        beta1, beta2, _ = self._checked_constants(group)
        decay = _decay(group)
        state["log_decay"] += math.log(decay)
        history = state["history"]
        if step >= len(history):
            history = state["history"] = torch.cat((history, torch.zeros_like(history)))
        entry = torch.tensor(
            [
                decay,
                float(group["lr"]) / (1 - beta1**step),
                1 / math.sqrt(1 - beta2**step),
                float(state["log_decay"]),
            ],
            dtype=torch.float64,
        )
        history[step].copy_(entry, non_blocking=True)

    def _checked_constants(self, group: dict[str, Any]) -> tuple[float, float, float]:
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        if _constants(group) != self._constants[number]:
            raise ValueError(
                f"betas and eps may not change, or missed steps could not be made up for: "
                f"{self._constants[number]} wanted, got {_constants(group)}"
            )
        return self._constants[number]

    def _load(self, state: dict[str, Tensor], name: str, saved: Tensor) -> None:
        if name in ("history", "log_decay"):  # the history's length is that of the other run
            state[name] = saved.detach().to(state[name].device, copy=True)
        else:
            super()._load(state, name, saved)


def looped_steps(beta1: float, beta2: float) -> int:
    """K: how many missed steps are gone through one by one; see the head of this file."""
    rho = beta1 / math.sqrt(beta2)
    if rho >= 1:
        return _EVERY_STEP
    if rho == 0:
        return 1
    return math.ceil((math.log(2.0**-24) + math.log1p(-rho)) / math.log(rho))


def _constants(group: dict[str, Any]) -> tuple[float, float, float]:
    return float(group["betas"][0]), float(group["betas"][1]), float(group["eps"])


def _decay(options: dict[str, Any]) -> float:
    decay = 1 - float(options["lr"]) * float(options["weight_decay"])
    if not 0.0 < decay <= 1.0:
        raise ValueError(
            f"lr * weight_decay: in [0, 1) wanted, got {options['lr']} * {options['weight_decay']}"
        )
    return decay
