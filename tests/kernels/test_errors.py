"""What the public calls say to arguments that do not fit: values, devices, types."""

import re

import pytest
import torch

from memory_kernels import (
    Fp8Shadow,
    RowGradients,
    merge_row_gradients,
    peer_experts,
    product_key_scores,
    product_key_topk,
    row_dot,
    weighted_bag,
)

TABLE = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
INDICES = torch.tensor([[1, 9], [0, 1]])
WEIGHTS = torch.ones(2, 2)
X = torch.ones(2, 4)
PAIR = torch.ones(2, 1, 6)
KEYS = torch.ones(1, 2, 5, 3)


def _table(kind: str, dtype: torch.dtype):
    table = TABLE.to(dtype)
    shadow = Fp8Shadow.of(table) if kind == "shadow" else None
    return (list(table.split(4)) if kind == "chunks" else table), shadow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["whole", "chunks", "shadow"])
@pytest.mark.parametrize("wrong", [-1, 10, 12, 10**9])
def test_indices_outside_the_table(wrong: int, kind: str, dtype):
    indices = torch.tensor([[wrong, 1], [0, 1]])
    table, shadow = _table(kind, dtype)
    message = re.escape(
        f"indices: each in [0, 10) wanted, got the smallest {min(wrong, 0)} and the largest "
        f"{max(wrong, 1)} for 10 rows"
    )
    with pytest.raises(IndexError, match=message):
        weighted_bag(table, indices, WEIGHTS, shadow=shadow)
    with pytest.raises(IndexError, match=message):
        row_dot(table, indices, X, shadow=shadow)
    shadows = None if shadow is None else (shadow, shadow)
    with pytest.raises(IndexError, match=message):
        peer_experts(table, table, indices, WEIGHTS, X, shadows=shadows)


def test_backward_writes_to_no_row_outside_the_table():
    sinks = [torch.zeros_like(TABLE)]
    with pytest.raises(IndexError, match="indices: each in"):
        torch.ops.memory_kernels.bag_backward(
            [TABLE], INDICES + 1, WEIGHTS, X, [], "main_grad", sinks, False
        )


def test_slots_outside_the_keys():
    with pytest.raises(IndexError, match=r"indices: each in \[0, 25\) .* largest 25"):
        product_key_scores(PAIR, KEYS, torch.tensor([[[3]], [[25]]]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: weighted_bag(TABLE, INDICES.to("meta"), WEIGHTS), "indices: on cpu wanted"),
        (
            lambda: weighted_bag(TABLE, INDICES, WEIGHTS.to("meta")),
            "weights: on cpu wanted, as the table, got meta",
        ),
        (lambda: weighted_bag(TABLE, INDICES, WEIGHTS, X.to("meta")), "gate: on cpu wanted"),
        (lambda: weighted_bag(TABLE.to("meta"), INDICES, WEIGHTS), "indices: on meta wanted"),
        (lambda: row_dot(TABLE, INDICES, X.to("meta")), "x: on cpu wanted"),
        (
            lambda: peer_experts(TABLE, TABLE.to("meta"), INDICES, WEIGHTS, X),
            "v: on cpu wanted, as u, got meta",
        ),
        (lambda: peer_experts(TABLE, TABLE, INDICES, WEIGHTS, X.to("meta")), "x: on cpu wanted"),
        (
            lambda: product_key_topk(PAIR, KEYS.to("meta"), 2),
            "keys: on cpu wanted, as query, got meta",
        ),
        (
            lambda: product_key_scores(PAIR, KEYS, torch.zeros(2, 1, 3, device="meta").int()),
            "indices: on cpu wanted, as query, got meta",
        ),
        (lambda: weighted_bag(None, INDICES, WEIGHTS), "table: Tensor wanted, got NoneType"),
        (lambda: weighted_bag([[1.0]], INDICES, WEIGHTS), "table: Tensor wanted, got list"),
        (lambda: weighted_bag(TABLE, INDICES.tolist(), WEIGHTS), "indices: Tensor wanted, got lis"),
        (lambda: weighted_bag(TABLE, INDICES, None), "weights: Tensor wanted, got NoneType"),
        (
            lambda: weighted_bag(TABLE, INDICES, WEIGHTS, shadow=TABLE),
            "shadow: Fp8Shadow wanted, got Tensor",
        ),
        (
            lambda: weighted_bag(TABLE, INDICES, WEIGHTS, row_gradients={}),
            "row_gradients: RowGradients wanted, got dict",
        ),
        (
            lambda: peer_experts(TABLE, TABLE, INDICES, WEIGHTS, X, main_grads=TABLE),
            "main_grads: a pair wanted, for u and for v, got Tensor",
        ),
        (lambda: product_key_topk(PAIR, None, 2), "keys: Tensor wanted, got NoneType"),
        (lambda: merge_row_gradients([]), "row_gradients: one or more"),
    ],
)
def test_messages_name_the_argument(call, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_what_is_printed_of_buffers_is_short():
    assert repr(RowGradients.empty(TABLE, 3)) == (
        "RowGradients(gradients=[3, 4] torch.float32, device=cpu)"
    )
    assert repr(Fp8Shadow.of(list(TABLE.split(8)))) == (
        "Fp8Shadow(values=[[8, 4] torch.float8_e4m3fn, [2, 4] torch.float8_e4m3fn], "
        "scales=[10] torch.float32)"
    )
