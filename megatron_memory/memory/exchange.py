"""An exchange between ranks, forward and backward, while they compute something else."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

R = TypeVar("R")


class Exchange:
    """All-to-all of [M * T, C] between the M ranks of a group: block i goes to rank i.

    What `received` is given to compute runs meanwhile, and so does its backward pass between the
    gradient's: autograd goes back in the order of the forward pass.
    """

    def __init__(self, x: Tensor, group: ProcessGroup):
        self._transfer = _Transfer(group)
        self.coming: Tensor = _Start.apply(x, self._transfer)
        """[M * T, C], not there yet: for `received` alone."""

    def received(self, coming: Tensor, compute: Callable[[], R]) -> tuple[Tensor, R]:
        """[M * T, C], block i rank i's, and what was computed meanwhile.

        Args:
            coming: `self.coming`; in a recomputation what stands for it, which has arrived.
            compute: does not communicate over the group.
        """
        coming = _WaitInBackward.apply(coming, self._transfer)
        computed = compute()
        return _Finish.apply(coming, self._transfer), computed


class _Transfer:
    """One transfer at a time; holds what is sent until it has arrived."""

    def __init__(self, group: ProcessGroup):
        self._group = group
        self._sent: Tensor | None = None
        self._work: Any = None

    def start(self, x: Tensor) -> Tensor:
        assert self._work is None, "the last transfer was not waited for"
        self._sent = x.contiguous()
        coming = torch.empty_like(self._sent)
        self._work = torch.distributed.all_to_all_single(
            coming, self._sent, group=self._group, async_op=True
        )
        return coming

    @property
    def is_under_way(self) -> bool:
        """Whether it has been started and not been waited for."""
        return self._work is not None

    def wait(self) -> None:
        self._work.wait()
        self._work = self._sent = None


class _Start(torch.autograd.Function):
    """Begins the transfer."""

    @staticmethod
    def forward(ctx, x: Tensor, transfer: _Transfer) -> Tensor:
        return transfer.start(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class _WaitInBackward(torch.autograd.Function):
    """The identity; backward waits for the gradient's transfer, which `_Finish` began.

    Not in `_Start`'s backward: a recomputation has a graph of its own, at whose leaves autograd may
    copy gradients, so that they must have arrived there.
    """

    @staticmethod
    def forward(ctx, coming: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return coming.view_as(coming)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        ctx.transfer.wait()
        return grad_output, None


class _Finish(torch.autograd.Function):
    """Waits for the transfer, the first time; backward begins the gradient's, the other way
    round."""

    @staticmethod
    def forward(ctx, coming: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        if transfer.is_under_way:
            transfer.wait()
        return coming.view_as(coming)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return ctx.transfer.start(grad_output), None
