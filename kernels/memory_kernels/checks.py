"""Checks that several public calls make of what they are given."""

from typing import Any

import torch
from torch import Tensor


def check_type(name: str, value: Any, wanted: type) -> None:
    """Raises ValueError unless the value is of that type."""
    if not isinstance(value, wanted):
        raise ValueError(f"{name}: {wanted.__name__} wanted, got {type(value).__name__}")


def check_device(name: str, tensor: Tensor, like: Tensor, what: str = "the table") -> None:
    """Raises ValueError unless the tensor is where `like` is, which messages call `what`.

    A kernel would take an address of another device for one of its own.
    """
    if tensor.device != like.device:
        raise ValueError(f"{name}: on {like.device} wanted, as {what}, got {tensor.device}")


def check_in_table(name: str, rows: Tensor, num_rows: int, count: Tensor | None = None) -> None:
    """Raises IndexError unless each row is in [0, num_rows).

    torch's operators check some reads and make others beyond the table. On the CPU alone: elsewhere
    a look at the values would wait for the device.

    Args:
        rows: any shape, int32 or int64.
        count: [1], how many of the rows hold; None for all.
    """
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if count is not None:
        rows = rows[: int(count)]
    if rows.numel() == 0:
        return
    smallest, largest = (int(extreme) for extreme in rows.aminmax())
    if smallest < 0 or largest >= num_rows:
        raise IndexError(
            f"{name}: each in [0, {num_rows}) wanted, got the smallest {smallest} and the largest "
            f"{largest} for {num_rows} rows"
        )
