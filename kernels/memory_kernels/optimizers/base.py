"""What the row-sparse optimizers share: tables, master weights, states, clipping, checkpoints."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from memory_kernels.bag.row_gradients import RowGradients, merge_row_gradients
from memory_kernels.checks import check_device, check_in_table, check_type
from memory_kernels.chunks import as_chunks, describe, num_rows
from memory_kernels.optimizers.precision import join_master
from memory_kernels.shadow import Fp8Shadow

MASTERS = ("exact", "stochastic", None)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

Gradient = RowGradients | Sequence[RowGradients] | None


class RowOptimizer(torch.optim.Optimizer):
    """An optimizer that changes the rows of the gradient and leaves all others alone.

    A table is a parameter [S, D] or a list of parameters, its row chunks. Each table is a param
    group, so that learning rates can differ and schedulers can change them. fp32 tables (fp64 on
    torch's operators) are updated as they are; bf16 tables by one of three ways, in precision.py.

    Args:
        tables: a list of tables, or of dicts with a table as `params`, options that differ from the
            defaults, and optionally `shadow`, an `Fp8Shadow` which is written with the table.
        master: for bf16 tables: `exact` (an int16 remainder an element makes the table an fp32
            master), `stochastic` (no master, stochastic rounding) or None (no master, rounding to
            the nearest).
        seed: of the stochastic rounding.

    Raises:
        ValueError: tables, shadows or options that do not fit.
    """

    def __init__(
        self, tables: Iterable[Any], defaults: dict[str, Any], master: str | None, seed: int
    ) -> None:
        if master not in MASTERS:
            raise ValueError(f"master: exact, stochastic or None wanted, got {master!r}")
        if isinstance(tables, Tensor):
            raise ValueError("tables: a list of tables wanted, got a tensor; write [table]")
        self._master, self._seed = master, seed
        self._shadows: list[Fp8Shadow | None] = []
        super().__init__([_as_group(table) for table in tables], dict(defaults, step=0))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_master", "_seed", "_shadows")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a table; the group is a dict as in the constructor."""
        group = dict(param_group)
        self._check_keys(group)
        shadow = group.pop("shadow", None)
        chunks = as_chunks(group["params"])
        group["params"] = chunks
        if chunks[0].dtype not in _DTYPES:
            raise ValueError(f"table: fp32, bf16 or fp64 wanted, got {describe(chunks[0])}")
        if shadow is not None:
            check_type("shadow", shadow, Fp8Shadow)
            shadow.check_cut(chunks)
        self._check_options({**self.defaults, **group})
        super().add_param_group(group)
        self._shadows.append(shadow)
        for chunk in chunks:
            self.state[chunk] = self._initial_state(chunk.detach(), self.param_groups[-1])

    def _check_keys(self, group: dict[str, Any]) -> None:
        # torch keeps what it does not know, and a misspelt shadow would go stale unseen. A
        # scheduler that resumes wants `initial_lr`.
        known = ["params", "shadow", *self.defaults, "initial_lr"]
        for key in group:
            if key not in known:
                raise ValueError(f"{key}: no option of a table; known are {', '.join(known)}")
        if "params" not in group:
            raise ValueError(f"params: the dict of a table has it, got {', '.join(group)}")

    def _check_options(self, options: dict[str, Any]) -> None:
        for name in ("lr", "eps"):
            if not options.get(name, 0.0) >= 0.0:
                raise ValueError(f"{name}: 0 or more wanted, got {options[name]}")

    def _initial_state(self, chunk: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a chunk; subclasses add theirs."""
        if self._rounding(chunk) != "exact":
            return {}
        return {"remainder": torch.zeros(chunk.shape, dtype=torch.int16, device=chunk.device)}

    def _rounding(self, chunk: Tensor) -> str:
        if chunk.dtype != torch.bfloat16 or self._master is None:
            return "nearest"
        return self._master

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        gradients: Gradient,
        *,
        max_norm: float | None = None,
        scale: Tensor | None = None,
    ) -> Tensor | None:
        """One step with each table's gradient. On Triton nothing waits for the device, unless there
        are several gradients of a table to be merged.

        Args:
            gradients: for each table a `RowGradients`, a list of several to be summed, or None if
                it was not read. One table's may stand alone.
            max_norm: if given, the gradient is scaled down to this L2 norm over all tables, as by
                torch.nn.utils.clip_grad_norm_.
            scale: if given, a number on the device that the gradient is multiplied by, for those
                who clip it together with other parameters.

        Returns:
            The norm before clipping, on the device, if max_norm is given.

        Raises:
            ValueError: gradients that do not fit the tables; max_norm not above 0, or with scale.
            IndexError: on the CPU, gradients of rows outside the table.
        """
        if max_norm is not None and scale is not None:
            raise ValueError("max_norm and scale: one of them, not both")
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm: above 0 wanted, got {max_norm}")
        merged = [
            self._checked(gradient, group)
            for gradient, group in zip(
                self._for_tables("gradients", gradients), self.param_groups, strict=True
            )
        ]
        norm = None
        if max_norm is not None:
            norm = gradient_norm(merged, self.param_groups[0]["params"][0].device)
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if scale is not None:
            scale = scale.detach().reshape(1).float()
        for number, gradient in enumerate(merged):
            group = self.param_groups[number]
            group["step"] += 1
            self._before_step(group)
            if gradient is not None:
                self._step_table(number, gradient.buffers(), scale)
        return norm

    def _before_step(self, group: dict[str, Any]) -> None:
        """Called once a step for each table, read or not."""

    def _step_table(self, number: int, gradient: list[Tensor], scale: Tensor | None) -> None:
        raise NotImplementedError

    def _weights(self, number: int) -> dict[str, Any]:
        """The operands of all update operators that make table `number`; see operators.py."""
        group, shadow = self.param_groups[number], self._shadows[number]
        rounding = self._rounding(group["params"][0])
        return dict(
            table=[chunk.detach() for chunk in group["params"]],
            remainder=self._states(number, "remainder") if rounding == "exact" else [],
            shadow=[] if shadow is None else [*shadow.bytes(), shadow.scales],
            rounding=rounding,
            seed=self._seed + number,
            step=group["step"],
        )

    def _states(self, number: int, name: str) -> list[Tensor]:
        return [self.state[chunk][name] for chunk in self.param_groups[number]["params"]]

    def _for_tables(self, name: str, given: Any) -> list[Any]:
        """What was given for each table."""
        if not isinstance(given, Sequence):
            given = [given]
        elif len(self.param_groups) == 1 and len(given) != 1:
            given = [given]  # several of the only table
        if len(given) != len(self.param_groups):
            raise ValueError(
                f"{name}: one for each of {len(self.param_groups)} tables wanted, got {len(given)}"
            )
        return list(given)

    def _checked(self, gradient: Gradient, group: dict[str, Any]) -> RowGradients | None:
        if gradient is None:
            return None
        chunks = group["params"]
        parts = list(gradient) if isinstance(gradient, Sequence) else [gradient]
        if not parts:
            return None
        for part in parts:
            _check_gradient(part, chunks)
        return merge_row_gradients(parts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a state in, from an optimizer of the same tables and options.

        States keep their dtypes, which torch's own method would change to the table's.

        Raises:
            ValueError: other tables, states or shapes.
        """
        groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in groups]
        ours = [len(group["params"]) for group in self.param_groups]
        if sizes != ours:
            raise ValueError(f"state_dict: tables of {ours} chunks wanted, got {sizes}")
        chunks = [chunk for group in self.param_groups for chunk in group["params"]]
        saved = [state_dict["state"].get(i, {}) for g in groups for i in g["params"]]
        for chunk, state in zip(chunks, saved, strict=True):
            _check_state(state, self.state[chunk])
        for chunk, state in zip(chunks, saved, strict=True):
            for name, tensor in state.items():
                self._load(self.state[chunk], name, tensor)
        for group, saved_group in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved_group.items() if k != "params"})

    def _load(self, state: dict[str, Tensor], name: str, saved: Tensor) -> None:
        state[name].copy_(saved)

    def master_weights(self, number: int = 0) -> list[Tensor]:
        """fp32 copies of the chunks of table `number`, with all the bits that training keeps."""
        chunks = [chunk.detach() for chunk in self.param_groups[number]["params"]]
        if self._rounding(chunks[0]) != "exact":
            return [chunk.to(torch.float32, copy=True) for chunk in chunks]
        remainders = self._states(number, "remainder")
        return [join_master(*pair) for pair in zip(chunks, remainders, strict=True)]


def gradient_norm(gradients: Sequence[RowGradients | None], device: torch.device) -> Tensor:
    """The L2 norm over all tables, a scalar on the device; nothing waits."""
    norms = [gradient.norm().to(device) for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else torch.zeros((), device=device)


def _as_group(table: Any) -> dict[str, Any]:
    if isinstance(table, dict):
        return table
    return {"params": [table] if isinstance(table, Tensor) else list(table)}


def _check_gradient(part: RowGradients, chunks: list[Tensor]) -> None:
    check_type("gradients", part, RowGradients)
    capacity = part.rows.shape[0]
    wanted = [(capacity,), (capacity, chunks[0].shape[1]), (capacity,), (1,)]
    if [tuple(buffer.shape) for buffer in part.buffers()] != wanted:
        raise ValueError(
            f"gradients: rows, gradients, squared norms and count of shapes {wanted} wanted for a "
            f"table of {num_rows(chunks)} rows, got {[tuple(b.shape) for b in part.buffers()]}"
        )
    if part.rows.dtype != torch.int64 or not part.gradients.is_floating_point():
        raise ValueError(
            f"gradients: int64 rows and floating point gradients wanted, got {part.rows.dtype} and "
            f"{part.gradients.dtype}"
        )
    for buffer in part.buffers():
        check_device("gradients", buffer, chunks[0])
    if not part.gradients.is_contiguous():
        raise ValueError("gradients: contiguous buffers wanted; make them by RowGradients.empty")
    check_in_table("gradients: rows", part.rows, num_rows(chunks), part.num_rows)


def _check_state(saved: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    if saved.keys() != ours.keys():
        raise ValueError(f"state_dict: states {sorted(ours)} wanted, got {sorted(saved)}")
    for name, tensor in ours.items():
        if name != "history" and saved[name].shape != tensor.shape:
            raise ValueError(
                f"state_dict: {name} {describe(tensor)} wanted, got {describe(saved[name])}"
            )
