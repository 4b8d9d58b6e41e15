"""The whole memory+ layer, forward and backward, against the SwiGLU FFN that it replaces."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.draws import random_table
from benchmarks.speed.results import NO_GOAL, Goal, Row
from benchmarks.speed.roofline import Bag, Cost, Retrieval, linear
from benchmarks.speed.setting import Case, Setting, empty_cache
from benchmarks.speed.timing import Contender, Stopwatch
from memory_kernels import Fp8Shadow, RowGradients, product_key_topk, weighted_bag


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer's sizes: memory and FFN."""

    name: str
    tokens: int
    hidden: int
    """Also the table's columns; the key's width is half of it."""
    ffn_hidden: int
    half_keys: int
    heads: int = 4
    k: int = 32

    @property
    def key_dim(self) -> int:
        """Of both halves."""
        return self.hidden // 2


_GPU = dict(tokens=16384, half_keys=1024)
_CPU = dict(tokens=512, half_keys=256)
SHAPES = {
    "gpu": (
        Shape(name="134m", hidden=768, ffn_hidden=2048, **_GPU),
        Shape(name="373m", hidden=1024, ffn_hidden=2816, **_GPU),
        Shape(name="1.3b", hidden=2048, ffn_hidden=5632, **_GPU),
        Shape(name="8b", hidden=4096, ffn_hidden=14336, **_GPU),
    ),
    "cpu": (Shape(name="quickstart", hidden=256, ffn_hidden=704, **_CPU),),
    "quick": (
        Shape(name="quick", tokens=6, hidden=16, ffn_hidden=24, half_keys=8, heads=2, k=4),
        Shape(name="373m", tokens=6, hidden=16, ffn_hidden=24, half_keys=8, heads=2, k=4),
    ),
}
GOALS = {"8b": Goal(least=1.0), "1.3b": Goal(least=1.5, aim=1.0)}
FP8_GOALS = {"373m": Goal(aim=1.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How the table is read and where its gradient goes."""

    form: str
    gradient: torch.dtype = torch.float32
    fp8: bool = False

    def __str__(self) -> str:
        shadow = ", fp8 shadow" if self.fp8 else ""
        return f"{self.form} {'fp32' if self.gradient.itemsize == 4 else 'bf16'}{shadow}"


WAYS = (Way(form="main_grad"), Way(form="rows"), Way(form="rows", gradient=torch.bfloat16))
FP8_WAYS = (
    Way(form="main_grad", fp8=True),
    Way(form="rows", gradient=torch.bfloat16, fp8=True),
)


class MemoryPlus(nn.Module):
    """W2 (y * silu(W1 x)), y the weighted sum of the rows that x's product keys choose."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.query = nn.Linear(shape.hidden, shape.heads * shape.key_dim)
        keys = torch.empty(shape.heads, 2, shape.half_keys, shape.key_dim // 2)
        self.keys = nn.Parameter(keys.uniform_(-(shape.key_dim**-0.5), shape.key_dim**-0.5))
        self.gate = nn.Linear(shape.hidden, shape.hidden)
        self.output = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor, table: Tensor, **options) -> Tensor:
        query = self.query(x).unflatten(-1, (self.shape.heads, -1))
        indices, weights = product_key_topk(query, self.keys, self.shape.k)
        y = weighted_bag(table, indices.flatten(1), weights.flatten(1), self.gate(x), **options)
        return self.output(y)


def swiglu(x: Tensor) -> Tensor:
    """[T, 2 F] to [T, F]; torch.compile makes one kernel of it, as training frameworks do."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), without biases; W1 and W2 in one product."""

    def __init__(self, shape: Shape, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.ffn_hidden, bias=False)
        self.down = nn.Linear(shape.ffn_hidden, shape.hidden, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """Of one repetition."""

    x: Tensor
    grad: Tensor


def cases(setting: Setting) -> Iterator[Case]:
    """All of this benchmark's cases."""
    for shape in SHAPES[setting.scale]:
        name = (
            f"{shape.name}: T {shape.tokens} D {shape.hidden} FFN {shape.ffn_hidden} "
            f"S {shape.half_keys**2} " + str(setting.dtype).removeprefix("torch.")
        )
        measure = partial(_layer, setting, shape, name)
        yield Case(what="memory+ layer", case=name, measure=measure)


def _ffn(module: nn.Module) -> Contender:
    def run(watch: Stopwatch, inputs: Inputs) -> None:
        x = inputs.x.detach().requires_grad_()
        with watch:
            module(x).backward(inputs.grad)
        module.zero_grad(set_to_none=True)

    return run


def _memory(layer: MemoryPlus, way: Way, table: Tensor, main_grad: Tensor, shadow) -> Contender:
    def run(watch: Stopwatch, inputs: Inputs) -> None:
        x = inputs.x.detach().requires_grad_()
        with watch:
            options = dict(main_grad=main_grad)
            if way.form == "rows":
                reads = len(x) * layer.shape.heads * layer.shape.k
                options = dict(row_gradients=RowGradients.empty(table, reads, way.gradient))
            layer(x, table, shadow=shadow, **options).backward(inputs.grad)
        layer.zero_grad(set_to_none=True)

    return run


def _draw(shape: Shape, setting: Setting) -> Inputs:
    x, grad = (
        torch.randn(shape.tokens, shape.hidden, dtype=setting.dtype, device=setting.device)
        for _ in range(2)
    )
    return Inputs(x=x, grad=grad)


def _layer(setting: Setting, shape: Shape, name: str) -> Iterator[Row]:
    """Each way of the memory against the FFN; on a GPU against the one whose activation is fused,
    the stronger one, with the plain one beside."""
    empty_cache(setting)
    options = dict(dtype=setting.dtype, device=setting.device)
    layer = MemoryPlus(shape).to(**options)
    table = random_table(shape.half_keys**2, shape.hidden, **options)
    main_grad = torch.zeros_like(table, dtype=torch.float32)
    ways = WAYS + (FP8_WAYS if shape.name in FP8_GOALS else ())
    shadow = Fp8Shadow.of(table) if shape.name in FP8_GOALS else None
    contenders = {
        str(way): _memory(layer, way, table, main_grad, shadow if way.fp8 else None) for way in ways
    }
    ffns = {"FFN": _ffn(SwiGLU(shape, swiglu).to(**options))}
    if setting.device.type == "cuda":
        fused = torch.compile(swiglu, dynamic=True)
        ffns["FFN, fused SwiGLU"] = _ffn(SwiGLU(shape, fused).to(**options))
    draw = partial(_draw, shape, setting)
    samples = setting.compare(contenders | ffns, draw)
    distinct = _distinct(layer, draw().x)
    for way in ways:
        goal = (FP8_GOALS if way.fp8 else GOALS).get(shape.name, NO_GOAL)
        for ffn in ffns:
            judged = setting.scale == "gpu" and ffn == list(ffns)[-1]
            yield Row(
                what=f"memory+ layer, {way}",
                case=name,
                measure="relative",
                ours=samples[str(way)].median,
                spread=samples[str(way)].spread,
                against=ffn,
                theirs=samples[ffn].median,
                floor=setting.floor(*stages(shape, way, setting.dtype.itemsize, distinct)),
                goal=goal if judged else NO_GOAL,
            )


@torch.no_grad()
def _distinct(layer: MemoryPlus, x: Tensor) -> float:
    """Rows that these tokens read at least once."""
    query = layer.query(x).unflatten(-1, (layer.shape.heads, -1))
    return float(product_key_topk(query, layer.keys, layer.shape.k)[0].unique().numel())


def stages(shape: Shape, way: Way, element: int, distinct: float) -> list[Cost]:
    """What the memory+ layer does at least, forward and backward, one after the other."""
    bag = Bag(
        tokens=shape.tokens,
        bag=shape.heads * shape.k,
        rows=shape.half_keys**2,
        columns=shape.hidden,
        element=1 if way.fp8 else element,
        output=element,
    )
    retrieval = Retrieval(
        tokens=shape.tokens,
        heads=shape.heads,
        half_keys=shape.half_keys,
        key_dim=shape.key_dim,
        k=shape.k,
        element=element,
    )
    projections = [
        linear(shape.tokens, shape.hidden, outputs, element) * 3
        for outputs in (shape.heads * shape.key_dim, shape.hidden, shape.hidden)
    ]
    return [
        *projections,
        retrieval.forward(),
        retrieval.backward(),
        bag.forward(gated=True),
        bag.backward(way.form, way.gradient.itemsize, distinct),
    ]


def ffn_stages(shape: Shape, element: int) -> list[Cost]:
    """What the SwiGLU FFN does at least, its activation fused: 3 values of F moved a token in
    forward, 5 in backward."""
    activation = shape.tokens * shape.ffn_hidden * element
    return [
        linear(shape.tokens, shape.hidden, 2 * shape.ffn_hidden, element) * 3,
        linear(shape.tokens, shape.ffn_hidden, shape.hidden, element) * 3,
        Cost(bytes=(3 + 5) * activation),
    ]
