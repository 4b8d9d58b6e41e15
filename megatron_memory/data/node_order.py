"""Who builds the index cache first, and how a failure on one rank reaches all of them."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_memory.exceptions import ConfigurationError, DataError

T = TypeVar("T")
_FIRST, _NODE_LEADER, _OTHER = range(3)


def on_node_leaders(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T | None:
    """Run `work` on the first rank of each node; the others wait and get None.

    Raises, on every rank, what it raised on one.
    """
    return _in_turns(work, (_FIRST, _NODE_LEADER), group)


def node_leaders_first(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `work` on rank 0, then on the first rank of each other node, then on the rest.

    So what `work` caches on a disk is written once: by rank 0 on a disk that all nodes share, by
    each node's first rank on its own.

    Raises, on every rank, what it raised on one.
    """
    result = _in_turns(work, (_FIRST, _NODE_LEADER, _OTHER), group)
    assert result is not None, "work() must return something"
    return result


def _in_turns(
    work: Callable[[], T], turns: tuple[int, ...], group: dist.ProcessGroup | None
) -> T | None:
    if not dist.is_initialized():
        return work()
    result = None
    for turn in turns:
        failure = None
        if turn == _turn_of_this_rank():
            try:
                result = work()
            # Whatever it is, the other ranks must hear of it, or they wait for ever.
            except Exception as error:
                failure = error
        _raise_everywhere(failure, group)
    return result


def _turn_of_this_rank() -> int:
    rank = dist.get_rank()
    if rank == 0:
        return _FIRST
    return _NODE_LEADER if int(os.environ.get("LOCAL_RANK", rank)) == 0 else _OTHER


def _raise_everywhere(failure: Exception | None, group: dist.ProcessGroup | None) -> None:
    report = None if failure is None else (type(failure).__name__, str(failure))
    reports: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    if failure is not None:
        raise failure
    for rank, other in enumerate(reports):
        if other is None:
            continue
        name, message = other
        for known in (ConfigurationError, DataError):
            if name == known.__name__:
                raise known(message)
        raise RuntimeError(f"rank {rank} failed while it built the datasets: {name}: {message}")
