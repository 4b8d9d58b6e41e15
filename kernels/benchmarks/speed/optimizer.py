"""Backward, clipping and Adam's step: on the rows that were read, and on the whole table."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.speed.backward import load_reference
from benchmarks.speed.bag import Reads, describe, draw_reads
from benchmarks.speed.draws import DISTRIBUTIONS, random_table
from benchmarks.speed.results import NO_GOAL, Goal, Row
from benchmarks.speed.roofline import Bag, Cost
from benchmarks.speed.setting import Case, Setting, empty_cache
from benchmarks.speed.timing import Contender, Sample, Stopwatch
from memory_kernels import RowGradients, weighted_bag
from memory_kernels.optimizers import RowAdam

GOALS = (Goal(least=1.6, aim=11), Goal(least=8, aim=11))  # small table, large table
SETTINGS = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
MAX_NORM = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one scale; a small and a large table."""

    tokens: int
    bag: int
    rows: tuple[int, int]
    columns: tuple[int, int]


SIZES = {
    # 512 columns of 16M rows: at 1024 two moments in fp32 would take 128 GiB of an H200's 139.
    "gpu": Sizes(tokens=16384, bag=128, rows=(1 << 20, 1 << 24), columns=(1024, 512)),
    "cpu": Sizes(tokens=256, bag=128, rows=(1 << 14, 1 << 17), columns=(256, 256)),
    "quick": Sizes(tokens=6, bag=4, rows=(64, 128), columns=(16, 16)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adam:
    """How RowAdam keeps its numbers."""

    name: str
    master: str | None
    moments: torch.dtype
    against: tuple[str, ...]
    """Names of dense ways. The goal holds for the first, which keeps its numbers alike."""

    def update_cost(self, elements: float) -> Cost:
        """Of the rows read: gradient read; table, moments and the master's other half read and
        written, once."""
        kept = 2 + 2 * self.moments.itemsize + (2 if self.master == "exact" else 0)
        return Cost(bytes=elements * (2 + 2 * kept))


ADAMS = (
    Adam(name="all bf16", master=None, moments=torch.bfloat16, against=("AdamW bf16",)),
    Adam(
        name="stochastic, fp32 moments",
        master="stochastic",
        moments=torch.float32,
        against=("AdamW bf16",),
    ),
    Adam(
        name="fp32 master and moments",
        master="exact",
        moments=torch.float32,
        against=("AdamW fp32", "AdamW bf16"),
    ),
)


def cases(setting: Setting) -> Iterator[Case]:
    """All of this benchmark's cases."""
    sizes = SIZES[setting.scale]
    for number, rows in enumerate(setting.table_rows(sizes.rows)):
        is_large = number == 1
        bag = Bag(tokens=sizes.tokens, bag=sizes.bag, rows=rows, columns=sizes.columns[number])
        for distribution in DISTRIBUTIONS[:1] if is_large else DISTRIBUTIONS:
            measure = partial(_optimizer, setting, bag, distribution, is_large)
            name = describe(bag, torch.bfloat16, distribution)
            yield Case(what="backward + clip + Adam", case=name, measure=measure)


def our_way(bag: Bag, device: torch.device, adam: Adam) -> Contender:
    """Catch-up before the read, backward to the rows that were read, clip and step on them; the
    forward between is not timed."""
    table = random_table(bag.rows, bag.columns, torch.bfloat16, device)
    optimizer = RowAdam([table], master=adam.master, moments_dtype=adam.moments, **SETTINGS)

    def run(watch: Stopwatch, reads: Reads) -> None:
        weights = reads.weights.detach().requires_grad_()
        rows = RowGradients.empty(table, reads.indices.numel(), table.dtype)
        with watch:
            optimizer.prepare(reads.indices)
        y = weighted_bag(table, reads.indices, weights, row_gradients=rows)
        with watch:
            y.backward(reads.grad)
            optimizer.step(rows, max_norm=MAX_NORM)

    return run


def reference_way(bag: Bag, device: torch.device, backward: Callable | None) -> Contender:
    """The reference's: a dense gradient, its norm clipped, torch's AdamW on all rows, all in bf16.

    `backward` is the public reference's; without it our backward in its dense form takes its place.
    """
    table = random_table(bag.rows, bag.columns, torch.bfloat16, device).requires_grad_()
    adam = torch.optim.AdamW([table], fused=device.type == "cuda", **SETTINGS)

    def run(watch: Stopwatch, reads: Reads) -> None:
        indices = reads.indices.long()
        weights = reads.weights.detach().requires_grad_()
        y = weighted_bag(table, reads.indices, weights)
        with watch:
            if backward is None:
                y.backward(reads.grad)
            else:
                table.grad, _ = backward(indices, table.detach(), reads.weights, reads.grad)
            torch.nn.utils.clip_grad_norm_([table], MAX_NORM)
            adam.step()
        table.grad = None

    return run


def master_way(bag: Bag, device: torch.device) -> Contender:
    """As training frameworks do it: an fp32 gradient of the table's size, zeroed and accumulated
    into, clipped; AdamW on all rows of an fp32 master; the bf16 table written from it."""
    table = random_table(bag.rows, bag.columns, torch.bfloat16, device)
    master = table.float().requires_grad_()
    main_grad = torch.zeros_like(master)
    adam = torch.optim.AdamW([master], fused=device.type == "cuda", **SETTINGS)

    def run(watch: Stopwatch, reads: Reads) -> None:
        weights = reads.weights.detach().requires_grad_()
        y = weighted_bag(table, reads.indices, weights, main_grad=main_grad)
        with watch:
            main_grad.zero_()
            y.backward(reads.grad)
            master.grad = main_grad
            torch.nn.utils.clip_grad_norm_([master], MAX_NORM)
            adam.step()
            table.copy_(master.detach())

    return run


def _ways(setting: Setting, bag: Bag, is_large: bool) -> dict[str, Callable[[], Contender]]:
    """What makes each contender when its turn comes: tables and moments are large."""
    device = setting.device
    backward = None if setting.reference is None else load_reference(setting.reference)
    ways = {adam.name: partial(our_way, bag, device, adam) for adam in ADAMS}
    ways["AdamW bf16"] = partial(reference_way, bag, device, backward)
    if not is_large:  # master, gradient and moments of all rows in fp32 do not fit
        ways["AdamW fp32"] = partial(master_way, bag, device)
    return ways


def _measure(
    setting: Setting, ways: dict[str, Callable[[], Contender]], draw: Callable, is_large: bool
) -> dict[str, Sample]:
    """In turn; large tables each alone on the GPU, one after the other, for all do not fit.

    Before them a few steps, so that rows are read that have missed as many steps as they do in a
    long run: of the large table a step reads one in nine.
    """
    samples: dict[str, Sample] = {}
    for names in [[name] for name in ways] if is_large else [list(ways)]:
        empty_cache(setting)
        contenders = {name: ways[name]() for name in names}
        for _ in range(24 if is_large and setting.scale == "gpu" else 3):
            for contender in contenders.values():
                contender(Stopwatch(setting.device), draw())
        samples |= setting.compare(contenders, draw)
    return samples


def _optimizer(setting: Setting, bag: Bag, distribution: str, is_large: bool) -> Iterator[Row]:
    draw = partial(draw_reads, bag, distribution, torch.bfloat16, setting.device)
    samples = _measure(setting, _ways(setting, bag, is_large), draw, is_large)
    distinct = float(draw().indices.unique().numel())
    stand_in = "" if setting.reference else ", our dense backward"
    for adam in ADAMS:
        floor = setting.floor(
            bag.backward("rows", 2, distinct), adam.update_cost(distinct * bag.columns)
        )
        for against in adam.against:
            if against not in samples:
                continue
            judged = setting.scale == "gpu" and against == adam.against[0]
            yield Row(
                what=f"backward + clip + Adam, {adam.name}",
                case=describe(bag, torch.bfloat16, distribution),
                ours=samples[adam.name].median,
                spread=samples[adam.name].spread,
                against=against + (stand_in if against == "AdamW bf16" else ""),
                theirs=samples[against].median,
                floor=floor,
                goal=GOALS[is_large] if judged and adam.master != "stochastic" else NO_GOAL,
            )
