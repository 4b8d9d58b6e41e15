"""product_key_topk against the operators of torch that anyone would write it with."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.results import NO_GOAL, Goal, Row
from benchmarks.speed.roofline import Retrieval
from benchmarks.speed.setting import Case, Setting, empty_cache
from benchmarks.speed.timing import Contender, Stopwatch
from memory_kernels import product_key_topk, use_kernels
from memory_kernels.choice import kernels_in_use

GOAL = Goal(least=5, aim=15)
SIZES = {
    # Keys of 512: the 373m shape's, half its width.
    "gpu": Retrieval(tokens=16384, heads=4, half_keys=1024, key_dim=512, k=32),
    "cpu": Retrieval(tokens=512, heads=4, half_keys=512, key_dim=256, k=32, element=4),
    "quick": Retrieval(tokens=5, heads=2, half_keys=16, key_dim=8, k=4, element=4),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one repetition."""

    query: Tensor
    keys: Tensor
    grad: Tensor
    """[T, H, K], of the weights."""


def naive_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Slots and weights, [T, H, K], as the paper's formulas read: two matrix products in the
    operands' dtype, top-k of each half, all K * K sums, top-k of those, softmax in fp32."""
    halves = query.unflatten(-1, (2, -1))
    scores = torch.einsum("thsd,hsnd->thsn", halves, keys)
    best, half_keys = scores.topk(k, dim=-1)
    sums = best[..., 0, :, None] + best[..., 1, None, :]
    slots = half_keys[..., 0, :, None] * keys.shape[2] + half_keys[..., 1, None, :]
    chosen, positions = sums.flatten(-2).topk(k, dim=-1)
    return slots.flatten(-2).gather(-1, positions), chosen.float().softmax(dim=-1)


def torch_topk(query: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """product_key_topk on torch's operators."""
    with _kernels("torch"):
        return product_key_topk(query, keys, k)


@contextlib.contextmanager
def _kernels(choice: str) -> Iterator[None]:
    before = kernels_in_use()
    use_kernels(choice)
    try:
        yield
    finally:
        use_kernels(before)


def cases(setting: Setting) -> Iterator[Case]:
    """All of this benchmark's cases."""
    sizes = SIZES[setting.scale]
    name = (
        f"T {sizes.tokens} H {sizes.heads} N {sizes.half_keys} Dk {sizes.key_dim} K {sizes.k} "
        + str(setting.dtype).removeprefix("torch.")
    )
    for with_backward in (False, True):
        what = "retrieval forward" + (" + backward" if with_backward else "")
        measure = partial(_retrieval, setting, sizes, what, name, with_backward)
        yield Case(what=what, case=name, measure=measure)


def _contender(topk: Callable, k: int, with_backward: bool) -> Contender:
    def forward(watch: Stopwatch, inputs: Inputs) -> None:
        with watch, torch.no_grad():
            topk(inputs.query, inputs.keys, k)

    def both(watch: Stopwatch, inputs: Inputs) -> None:
        query, keys = (t.detach().requires_grad_() for t in (inputs.query, inputs.keys))
        with watch:
            _, weights = topk(query, keys, k)
            weights.backward(inputs.grad)

    return both if with_backward else forward


def _draw(sizes: Retrieval, dtype: torch.dtype, device: torch.device) -> Inputs:
    # Keys as a model begins with, and queries as wide as layer norms make them.
    query = torch.randn(sizes.tokens, sizes.heads, sizes.key_dim, device=device)
    keys = torch.empty(sizes.heads, 2, sizes.half_keys, sizes.key_dim // 2, device=device)
    bound = sizes.key_dim**-0.5
    keys.uniform_(-bound, bound)
    return Inputs(
        query=query.to(dtype),
        keys=keys.to(dtype),
        grad=torch.randn(sizes.tokens, sizes.heads, sizes.k, device=device),
    )


def _retrieval(
    setting: Setting, sizes: Retrieval, what: str, name: str, with_backward: bool
) -> Iterator[Row]:
    empty_cache(setting)
    ways = {"ours": product_key_topk, "naive torch": naive_topk, "our torch path": torch_topk}
    if setting.device.type == "cpu":  # where product_key_topk is its torch path
        del ways["our torch path"]
    contenders = {name: _contender(way, sizes.k, with_backward) for name, way in ways.items()}
    draw = partial(_draw, sizes, setting.dtype, setting.device)
    samples = setting.compare(contenders, draw)
    stages = [sizes.forward(), sizes.backward()] if with_backward else [sizes.forward()]
    for baseline in list(ways)[1:]:
        judged = setting.scale == "gpu" and baseline == "naive torch"
        yield Row(
            what=what,
            case=name,
            ours=samples["ours"].median,
            spread=samples["ours"].spread,
            against=baseline,
            theirs=samples[baseline].median,
            floor=setting.floor(*stages),
            goal=GOAL if judged else NO_GOAL,
        )
