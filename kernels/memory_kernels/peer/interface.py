"""The public call. Axes: T tokens, B experts read a token, S experts, D columns."""

from typing import Any

from torch import Tensor

from memory_kernels.bag.interface import (
    Table,
    check_operand,
    check_reads,
    requiring_grad,
    shadow_tensors,
    sinks_of,
)
from memory_kernels.bag.row_gradients import RowGradients
from memory_kernels.checks import check_device
from memory_kernels.chunks import as_chunks
from memory_kernels.peer import operators
from memory_kernels.shadow import Fp8Shadow


def peer_experts(
    u: Table,
    v: Table,
    indices: Tensor,
    weights: Tensor,
    x: Tensor,
    *,
    main_grads: tuple[Table, Table] | None = None,
    row_gradients: tuple[RowGradients, RowGradients] | None = None,
    shadows: tuple[Fp8Shadow, Fp8Shadow] | None = None,
) -> Tensor:
    """y[t] = sum over b of weights[t, b] * gelu(x[t] . u[i]) * v[i], i = indices[t, b].

    "Mixture of A Million Experts" (He 2024), equation 4: an expert is a row of u and a row of v.
    The products are kept in fp32 and the reads are sorted once for both tables' gradients. Where
    the columns are split over ranks the products need a sum over them: `row_dot`, the sum, GELU and
    `weighted_bag` then do the same in parts.

    Args:
        u, v: [S, D] each, of one dtype; or lists of row chunks.
        indices: [T, B], int32 or int64, each in [0, S).
        weights: [T, B], floating point.
        x: [T, D], floating point.
        main_grads, row_gradients, shadows: for u and v, each as in `weighted_bag`.

    Returns:
        [T, D] in v's dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        IndexError: on the CPU's torch path, indices outside the tables.
    """
    chunks_u, chunks_v = check_reads(u, indices, "u"), as_chunks(v, "v")
    check_device("v", chunks_v[0], chunks_u[0], "u")
    if [c.shape for c in chunks_u] != [c.shape for c in chunks_v]:
        raise ValueError("v: the shape and chunks of u wanted, the experts are rows of both")
    check_operand("weights", weights, tuple(indices.shape), chunks_u[0])
    check_operand("x", x, (indices.shape[0], chunks_u[0].shape[1]), chunks_u[0])
    main_u, main_v = _pair("main_grads", main_grads)
    rows_u, rows_v = _pair("row_gradients", row_gradients)
    form, sinks_u = sinks_of(chunks_u, indices, main_u, rows_u)
    _, sinks_v = sinks_of(chunks_v, indices, main_v, rows_v)
    if form != "dense":
        chunks_u, chunks_v = [c.detach() for c in chunks_u], [c.detach() for c in chunks_v]
        weights = requiring_grad(weights)
    shadow_u, shadow_v = _pair("shadows", shadows)
    y, _ = operators.peer_experts(
        chunks_u,
        chunks_v,
        indices,
        weights,
        x,
        shadow_tensors(shadow_u, chunks_u),
        shadow_tensors(shadow_v, chunks_v),
        form,
        sinks_u,
        sinks_v,
    )
    return y


def _pair(name: str, given: Any) -> tuple[Any, Any]:
    """What was given for u and what for v."""
    if given is None:
        return None, None
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ValueError(f"{name}: a pair wanted, for u and for v, got {type(given).__name__}")
    return given[0], given[1]
