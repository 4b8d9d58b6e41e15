"""One answer on all ranks: what is looked up on one rank, and errors that only some ranks meet."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_memory.exceptions import CheckpointError

T = TypeVar("T")


def described(error: OSError) -> str:
    """An error of the system for the user: its file, where it has one, and what it says."""
    if error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def ask_first_rank(function: Callable[[], T]) -> T:
    """Call the function on rank 0 and return its answer on every rank; a collective call.

    Raises:
        CheckpointError: on every rank, where the function raised it or an OSError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except CheckpointError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = described(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    return outcome[0]


def raise_on_all(problem: str | None) -> None:
    """Raise the first rank's problem on every rank; a collective call.

    Raises:
        CheckpointError: some rank has a problem.
    """
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise CheckpointError(first)
