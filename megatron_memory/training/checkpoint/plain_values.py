"""Whether the plain values of a checkpoint can be what a training wrote."""

from collections.abc import Callable
from typing import Any

from megatron_memory.reading.pickles import UnsafeFile, shown


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_size(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_layout(value: Any) -> bool:
    return type(value) is dict and all(
        type(name) is str and _is_count(size) for name, size in value.items()
    )


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "iteration": (_is_count, "a whole number, 0 or more"),
    "consumed_samples": (_is_count, "a whole number, 0 or more"),
    "usage_since_sample": (_is_count, "a whole number, 0 or more"),
    "optimizer_step": (_is_count, "a whole number, 0 or more"),
    "vocab_size": (_is_size, "a whole number above 0"),
    "layout": (_is_layout, "the parallel sizes by their names"),
    "has_generators": (lambda value: type(value) is bool, "true or false"),
    "device": (lambda value: type(value) is str, "the name of a device"),
}


def check_plain_values(common: Any, iteration: int | None) -> None:
    """Check what a loader relies on; values that another program left out are not missed.

    Args:
        common: the content of `common.pt`.
        iteration: what the folder's name says; None where it says nothing.

    Raises:
        UnsafeFile: names the value.
    """
    if type(common) is not dict:
        raise UnsafeFile("it holds no values by name")
    for name, (holds, expected) in _EXPECTED.items():
        if name in common and not holds(common[name]):
            raise UnsafeFile(f"{name} is {shown(common[name])}, and must be {expected}")
    if iteration is not None and common.get("iteration", iteration) != iteration:
        raise UnsafeFile(
            f"it is of iteration {common['iteration']}, and its folder is named after iteration "
            f"{iteration}. Give the folder its own name, or copy the checkpoint again"
        )
