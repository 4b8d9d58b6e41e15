"""The overlapped all-to-all is the plain one, and other work runs while it is under way, forward
and backward."""

import pytest
import torch

from megatron_memory.memory import exchange
from tests.distributed import run_ranks

RANKS, TOKENS, COLUMNS = 3, 2, 5


class _Log(torch.autograd.Function):
    """Twice its input; says when it computes, forward and backward."""

    @staticmethod
    def forward(ctx, x, log):
        ctx.log = log
        log.append("compute")
        return 2 * x

    @staticmethod
    def backward(ctx, grad_output):
        ctx.log.append("compute")
        return 2 * grad_output, None


class _LoggedTransfer(exchange._Transfer):
    log: list[str]

    def start(self, x):
        self.log.append("start")
        return super().start(x)

    def wait(self):
        self.log.append("wait")
        super().wait()


def _exchange() -> dict:
    rank, log = torch.distributed.get_rank(), []
    _LoggedTransfer.log = log
    exchange._Transfer = _LoggedTransfer
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(RANKS * TOKENS, COLUMNS, generator=generator, requires_grad=True)
    other = torch.randn(4, requires_grad=True)
    under_way = exchange.Exchange(2 * x, torch.distributed.group.WORLD)
    received, computed = under_way.received(under_way.coming, lambda: _Log.apply(other, log))
    forward = list(log)
    log.clear()
    weights = torch.randn(received.shape, generator=generator)
    ((received * weights).sum() + computed.sum()).backward()
    return dict(
        x=x.detach(), received=received.detach(), weights=weights, grad=x.grad,
        forward=forward, backward=log, other=other.grad,
    )  # fmt: skip


def _swap(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """By the definition: block i of rank j's becomes block j of rank i's."""
    blocks = [tensor.split(TOKENS) for tensor in tensors]
    return [torch.cat([blocks[j][i] for j in range(RANKS)]) for i in range(RANKS)]


@pytest.mark.distributed
def test_exchange():
    ranks = run_ranks(_exchange, RANKS)
    sent = _swap([2 * rank["x"] for rank in ranks])
    gradients = _swap([2 * rank["weights"] for rank in ranks])
    for rank, received, gradient in zip(ranks, sent, gradients, strict=True):
        assert torch.equal(rank["received"], received)
        assert torch.equal(rank["grad"], gradient)
        assert (rank["other"] == 2).all()
        assert rank["forward"] == ["start", "compute", "wait"]
        assert rank["backward"] == ["start", "compute", "wait"]
