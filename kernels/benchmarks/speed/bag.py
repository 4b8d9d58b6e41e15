"""weighted_bag: forward against the memory bus, forward + backward against F.embedding_bag."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.draws import DISTRIBUTIONS, draw_indices, random_table
from benchmarks.speed.results import NO_GOAL, Goal, Row
from benchmarks.speed.roofline import Bag
from benchmarks.speed.setting import Case, Setting, empty_cache
from benchmarks.speed.timing import Contender, Stopwatch
from memory_kernels import Fp8Shadow, RowGradients, weighted_bag

FORWARD_GOAL, FORWARD_GOAL_512 = Goal(least=0.85, aim=0.95), Goal(least=0.80, aim=0.95)
STEP_GOAL = Goal(least=6, aim=10)
CPU_GOAL = Goal(least=1, aim=2.6)  # 101 ms over 38: the trial that design began with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one scale."""

    tokens: int
    bag: int
    rows: int
    columns: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


SIZES = {
    "gpu": Sizes(
        tokens=16384, bag=128, rows=1 << 20, columns=(512, 1024, 4096), dtypes=(torch.bfloat16,)
    ),
    "cpu": Sizes(
        tokens=512, bag=128, rows=1 << 18, columns=(512,), dtypes=(torch.float32, torch.bfloat16)
    ),
    "quick": Sizes(tokens=6, bag=4, rows=64, columns=(16,), dtypes=(torch.float32, torch.bfloat16)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
    """The inputs of one repetition."""

    indices: Tensor
    weights: Tensor
    """In the table's dtype, which F.embedding_bag asks for."""
    grad: Tensor
    """[T, D], of the output."""


def draw_reads(bag: Bag, distribution: str, dtype: torch.dtype, device: torch.device) -> Reads:
    """Fresh ones."""
    return Reads(
        indices=draw_indices(distribution, bag.tokens, bag.bag, bag.rows, device),
        weights=torch.rand(bag.tokens, bag.bag, device=device).to(dtype),
        grad=torch.randn(bag.tokens, bag.columns, dtype=dtype, device=device),
    )


def describe(bag: Bag, dtype: torch.dtype, distribution: str) -> str:
    """A case in words."""
    rows = f"{bag.rows >> 20}M" if bag.rows >= 1 << 20 else f"{bag.rows}"
    name = str(dtype).removeprefix("torch.")
    return f"T {bag.tokens} B {bag.bag} S {rows} D {bag.columns} {name} {distribution}"


def cases(setting: Setting) -> Iterator[Case]:
    """All of this benchmark's cases."""
    sizes = SIZES[setting.scale]
    (rows,) = setting.table_rows((sizes.rows,))
    for columns in sizes.columns:
        for dtype in sizes.dtypes:
            bag = Bag(
                tokens=sizes.tokens,
                bag=sizes.bag,
                rows=rows,
                columns=columns,
                element=dtype.itemsize,
                output=dtype.itemsize,
            )
            for distribution in DISTRIBUTIONS:
                arguments = (setting, bag, dtype, distribution)
                name = describe(bag, dtype, distribution)
                if setting.scale != "cpu":
                    yield Case(what="bag forward", case=name, measure=partial(_forward, *arguments))
                yield Case(
                    what="bag forward + backward", case=name, measure=partial(_step, *arguments)
                )


def _forward(setting: Setting, bag: Bag, dtype: torch.dtype, distribution: str) -> Iterator[Row]:
    """The bus's share: of the table itself, and of its fp8 shadow."""
    empty_cache(setting)
    table = random_table(bag.rows, bag.columns, dtype, setting.device)
    shadow = Fp8Shadow.of(table)

    def contender(**options) -> Contender:
        def run(watch: Stopwatch, reads: Reads) -> None:
            with watch, torch.no_grad():
                weighted_bag(table, reads.indices, reads.weights, **options)

        return run

    draw = partial(draw_reads, bag, distribution, dtype, setting.device)
    samples = setting.compare({"ours": contender(), "fp8": contender(shadow=shadow)}, draw)
    distinct = _distinct(draw) if distribution == "zipf" else None
    goal = NO_GOAL
    if distribution == "uniform" and setting.scale == "gpu":
        goal = FORWARD_GOAL if bag.columns >= 1024 else FORWARD_GOAL_512
    yield Row(
        what="bag forward",
        case=describe(bag, dtype, distribution),
        measure="share",
        ours=samples["ours"].median,
        spread=samples["ours"].spread,
        floor=setting.floor(bag.forward(distinct=distinct)),
        goal=goal,
    )
    fp8 = dataclasses.replace(bag, element=1)
    yield Row(
        what="bag forward, fp8 shadow",
        case=describe(bag, dtype, distribution),
        ours=samples["fp8"].median,
        spread=samples["fp8"].spread,
        against="ours without shadow",
        theirs=samples["ours"].median,
        floor=setting.floor(fp8.forward(distinct=distinct)),
    )


def _distinct(draw) -> float:
    """Rows read at least once, in one draw."""
    return float(draw().indices.unique().numel())


def torch_step(table: Tensor, sparse: bool) -> Contender:
    """Forward and backward through F.embedding_bag, gradients of weights and table by autograd.

    A sparse gradient is coalesced: until then it is a copy of the output's gradient for each read,
    which no optimizer but plain SGD can use.
    """

    def run(watch: Stopwatch, reads: Reads) -> None:
        table.grad = None
        weights = reads.weights.detach().requires_grad_()
        with watch:
            F.embedding_bag(
                reads.indices, table, per_sample_weights=weights, mode="sum", sparse=sparse
            ).backward(reads.grad)
            if sparse:
                table.grad.coalesce()
        table.grad = None

    return run


def our_step(table: Tensor, form: str, main_grad: Tensor | None = None) -> Contender:
    """The same by weighted_bag; `form` is where the table's gradient goes."""

    def run(watch: Stopwatch, reads: Reads) -> None:
        weights = reads.weights.detach().requires_grad_()
        with watch:
            rows = None
            if form == "rows":
                rows = RowGradients.empty(table, reads.indices.numel())
            weighted_bag(
                table, reads.indices, weights, main_grad=main_grad, row_gradients=rows
            ).backward(reads.grad)
        table.grad = None

    return run


def _step(setting: Setting, bag: Bag, dtype: torch.dtype, distribution: str) -> Iterator[Row]:
    empty_cache(setting)
    table = random_table(bag.rows, bag.columns, dtype, setting.device).requires_grad_()
    main_grad = torch.zeros_like(table, dtype=torch.float32)
    contenders = {
        "main_grad": our_step(table, "main_grad", main_grad),
        "rows": our_step(table, "rows"),
        "torch": torch_step(table, sparse=False),
    }
    if setting.scale == "cpu":  # a dense gradient takes most of the time there, whoever makes it
        contenders["torch sparse"] = torch_step(table, sparse=True)
    else:
        contenders["dense"] = our_step(table, "dense")
    draw = partial(draw_reads, bag, distribution, dtype, setting.device)
    samples = setting.compare(contenders, draw)
    distinct = _distinct(draw)
    forward = bag.forward(distinct=distinct if distribution == "zipf" else None)
    baselines = [name for name in ("torch", "torch sparse") if name in samples]
    for form, gradient in (("main_grad", 4), ("rows", 4), ("dense", dtype.itemsize)):
        for baseline in baselines if form in samples else []:
            yield Row(
                what=f"bag forward + backward, {form}",
                case=describe(bag, dtype, distribution),
                ours=samples[form].median,
                spread=samples[form].spread,
                against="embedding_bag" + baseline.removeprefix("torch"),
                theirs=samples[baseline].median,
                floor=setting.floor(forward, bag.backward(form, gradient, distinct)),
                goal=_step_goal(setting, baseline),
            )


def _step_goal(setting: Setting, baseline: str) -> Goal:
    if setting.scale == "gpu":
        return STEP_GOAL
    return CPU_GOAL if setting.scale == "cpu" and baseline == "torch" else NO_GOAL
