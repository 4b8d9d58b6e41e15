"""An exchange between ranks, forward and backward, while they compute something else."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Exchange:
    """All-to-all of [M * T, C] between the M ranks of a group: block i goes to rank i.

    What is computed between making it and `received` runs meanwhile, and so does its backward pass
    between the gradient's: autograd goes back in the order of the forward pass.
    """

    def __init__(self, x: Tensor, group: ProcessGroup):
        self._transfer = _Transfer(group)
        self._coming = _Start.apply(x, self._transfer)

    def received(self) -> Tensor:
        """[M * T, C]: block i is rank i's."""
        return _Finish.apply(self._coming, self._transfer)


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

    def wait(self) -> None:
        self._work.wait()
        self._work = self._sent = None


class _Start(torch.autograd.Function):
    """Begins the transfer; backward waits for the gradient's, which `_Finish` began."""

    @staticmethod
    def forward(ctx, x: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        ctx.transfer.wait()
        return grad_output, None


class _Finish(torch.autograd.Function):
    """Waits for the transfer; backward begins the gradient's, the other way round."""

    @staticmethod
    def forward(ctx, coming: Tensor, transfer: _Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return coming.view_as(coming)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return ctx.transfer.start(grad_output), None
