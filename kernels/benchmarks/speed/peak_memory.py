"""Memory that a training step takes beyond what rests between steps, against a dense gradient."""

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.speed.bag import Reads, describe, draw_reads
from benchmarks.speed.draws import random_table
from benchmarks.speed.optimizer import ADAMS, our_way, reference_way
from benchmarks.speed.results import NO_GOAL, Goal, Row
from benchmarks.speed.roofline import Bag
from benchmarks.speed.setting import Case, Setting, empty_cache
from benchmarks.speed.timing import Contender, Stopwatch
from memory_kernels import weighted_bag

GOAL = Goal(least=0.5, aim=0.25)
NUM_LAYERS = 3
"""Memory layers that read one table, as in the paper."""
SHAPES = {
    "gpu": ((16384, 128, 1 << 20, 1024), (16384, 128, 1 << 24, 512)),
    "cpu": ((64, 128, 1 << 14, 256), (64, 128, 1 << 17, 256)),
    "quick": ((6, 4, 64, 16), (6, 4, 128, 16)),
}


def cases(setting: Setting) -> Iterator[Case]:
    """All of this benchmark's cases."""
    shapes = SHAPES[setting.scale]
    rows = setting.table_rows((shapes[0][2], shapes[1][2]))
    small, large = (
        Bag(tokens=tokens, bag=bag, rows=number, columns=columns)
        for (tokens, bag, _, columns), number in zip(shapes, rows, strict=True)
    )
    device = setting.device
    yield _case(
        setting,
        f"peak memory, main_grad, {NUM_LAYERS} layers",
        small,
        partial(_into_main_grad, small, device, True),
        partial(_into_main_grad, small, device, False),
    )
    yield _case(
        setting,
        "peak memory, rows and RowAdam, all bf16",
        large,
        partial(our_way, large, device, ADAMS[0]),
        partial(reference_way, large, device, None),
    )


def _case(setting: Setting, what: str, bag: Bag, ours: Callable, theirs: Callable) -> Case:
    name = describe(bag, torch.bfloat16, "uniform")
    measure = partial(_peaks, setting, what, bag, ours, theirs)
    return Case(what=what, case=name, measure=measure)


def _into_main_grad(bag: Bag, device: torch.device, direct: bool) -> Contender:
    """Layers that read one table, in turn; the fp32 buffer of its gradient rests, for both ways.

    `direct` writes to it from backward; else autograd sums dense gradients of the table, which are
    added to the buffer afterwards, as frameworks do for any parameter.
    """
    table = random_table(bag.rows, bag.columns, torch.bfloat16, device).requires_grad_()
    main_grad = torch.zeros_like(table, dtype=torch.float32)

    def run(watch: Stopwatch, reads: Reads) -> None:
        weights = reads.weights.detach().requires_grad_()
        with watch:
            destination = main_grad if direct else None
            outputs = [
                weighted_bag(table, reads.indices, weights, main_grad=destination)
                for _ in range(NUM_LAYERS)
            ]
            torch.autograd.backward(outputs, [reads.grad] * NUM_LAYERS)
            if not direct:
                main_grad.add_(table.grad)
                table.grad = None

    return run


def _peaks(
    setting: Setting, what: str, bag: Bag, ours: Callable, theirs: Callable
) -> Iterator[Row]:
    (our_step, our_peak), (their_step, their_peak) = (
        _peak_of_step(setting, bag, make) for make in (ours, theirs)
    )
    common = dict(
        case=describe(bag, torch.bfloat16, "uniform"),
        measure="relative",
        unit="GiB",
        against="dense gradient",
        note="" if our_peak else "torch does not count the CPU's memory",
    )
    goal = GOAL if setting.scale == "gpu" else NO_GOAL
    yield Row(what=what, ours=our_step, theirs=their_step, goal=goal, **common)
    whole = f"{what}, with what rests"
    yield Row(what=whole, ours=our_peak, theirs=their_peak, **common)


def _peak_of_step(
    setting: Setting, bag: Bag, make: Callable[[], Contender]
) -> tuple[float | None, float | None]:
    """Bytes of the third step beyond those held before it, and all of them; None on the CPU."""
    gc.collect()
    empty_cache(setting)
    step = make()
    for _ in range(2):  # the moments are made, and every kernel is loaded
        step(Stopwatch(setting.device), _reads(setting, bag))
    reads = _reads(setting, bag)
    if setting.device.type != "cuda":
        step(Stopwatch(setting.device), reads)
        return None, None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(Stopwatch(setting.device), reads)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return float(peak - before), float(peak)


def _reads(setting: Setting, bag: Bag) -> Reads:
    return draw_reads(bag, "uniform", torch.bfloat16, setting.device)
