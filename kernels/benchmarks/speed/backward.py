"""The bag's backward alone, against the public reference's and FBGEMM's."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.bag import Reads, describe, draw_reads
from benchmarks.speed.draws import DISTRIBUTIONS, random_table
from benchmarks.speed.results import NO_GOAL, Goal, Row
from benchmarks.speed.roofline import Bag
from benchmarks.speed.setting import Case, Setting, empty_cache
from benchmarks.speed.timing import Contender, Stopwatch
from memory_kernels import RowGradients, weighted_bag

GOALS = (Goal(least=2, aim=4), Goal(least=6, aim=10))  # small table, large table
ROWS = {"gpu": (1 << 20, 1 << 24), "cpu": (1 << 14, 1 << 18), "quick": (64, 128)}
SHAPES = {"gpu": (16384, 128, 1024), "cpu": (256, 128, 512), "quick": (6, 4, 16)}
NOT_GIVEN = "give --reference DIR, a checkout of github.com/facebookresearch/memory"


def cases(setting: Setting) -> Iterator[Case]:
    """All of this benchmark's cases."""
    tokens, reads, columns = SHAPES[setting.scale]
    small = Bag(tokens=tokens, bag=reads, rows=ROWS[setting.scale][0], columns=columns)
    name = describe(small, torch.float16, "uniform")
    yield Case(what="FBGEMM", case=name, measure=partial(_fbgemm, setting, small, name))
    for number, rows in enumerate(setting.table_rows(ROWS[setting.scale])):
        bag = Bag(tokens=tokens, bag=reads, rows=rows, columns=columns)
        for distribution in DISTRIBUTIONS:
            name = describe(bag, torch.bfloat16, distribution)
            goal = GOALS[number] if setting.scale == "gpu" else NO_GOAL
            measure = partial(_backward, setting, bag, distribution, goal)
            yield Case(what="bag backward", case=name, measure=measure)


def load_reference(checkout: Path) -> Callable[..., tuple[Tensor, Tensor]]:
    """The reference's backward by inverted indices, its pre-pass included.

    It takes indices, table, weights and the output's gradient and returns the gradients of table
    and weights. It is run as it lies in the checkout (CC-BY-NC; commit 7f85280 was read for the
    name and the order of arguments); the table's rows must be a multiple of its block.

    Raises:
        FileNotFoundError: no such checkout.
    """
    path = checkout / "lingua/product_key/xformer_embeddingbag.py"
    if not path.is_file():
        raise FileNotFoundError(f"--reference: {path.relative_to(checkout)} is not in it")
    spec = importlib.util.spec_from_file_location("public_reference", path)
    assert spec is not None and spec.loader is not None, "a path to a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.embedding_bag_bw_rev_indices


def our_backward(table: Tensor, form: str, main_grad: Tensor | None = None) -> Contender:
    """Gradients of weights and table; the forward is not timed."""

    def run(watch: Stopwatch, reads: Reads) -> None:
        rows = None
        if form == "rows":
            rows = RowGradients.empty(table, reads.indices.numel(), table.dtype)
        weights = reads.weights.detach().requires_grad_()
        y = weighted_bag(table, reads.indices, weights, main_grad=main_grad, row_gradients=rows)
        with watch:
            y.backward(reads.grad)
        table.grad = None

    return run


def _reference_backward(table: Tensor, backward: Callable) -> Contender:
    def run(watch: Stopwatch, reads: Reads) -> None:
        indices = reads.indices.long()  # as torch.topk gives them, which it is written for
        with watch:
            backward(indices, table.detach(), reads.weights, reads.grad)

    return run


def _backward(setting: Setting, bag: Bag, distribution: str, goal: Goal) -> Iterator[Row]:
    empty_cache(setting)
    table = random_table(bag.rows, bag.columns, torch.bfloat16, setting.device).requires_grad_()
    contenders = {"rows": our_backward(table, "rows")}
    # An fp32 buffer of the large table's size does not fit beside the rest.
    if bag.rows * bag.columns <= 1 << 32:
        main_grad = torch.zeros_like(table, dtype=torch.float32)
        contenders["main_grad"] = our_backward(table, "main_grad", main_grad)
        contenders["dense"] = our_backward(table, "dense")
    draw = partial(draw_reads, bag, distribution, torch.bfloat16, setting.device)
    if setting.reference is not None:
        backward = load_reference(setting.reference)
        _check_agreement(backward, setting.device)
        contenders["reference"] = _reference_backward(table, backward)
    samples = setting.compare(contenders, draw)
    reference = samples.pop("reference", None)
    distinct = float(draw().indices.unique().numel())
    for form, sample in samples.items():
        gradient = 4 if form == "main_grad" else 2
        yield Row(
            what=f"bag backward, {form}",
            case=describe(bag, torch.bfloat16, distribution),
            ours=sample.median,
            spread=sample.spread,
            against="reverse_indices",
            theirs=None if reference is None else reference.median,
            floor=setting.floor(bag.backward(form, gradient, distinct)),
            goal=goal,
            note=NOT_GIVEN if reference is None else "",
        )


def _check_agreement(backward: Callable, device: torch.device) -> None:
    """Both compute the same thing, or comparing their times says nothing."""
    bag = Bag(tokens=64, bag=32, rows=1 << 13, columns=256)
    table = random_table(bag.rows, bag.columns, torch.bfloat16, device).requires_grad_()
    reads = draw_reads(bag, "uniform", torch.bfloat16, device)
    weights = reads.weights.detach().requires_grad_()
    weighted_bag(table, reads.indices, weights).backward(reads.grad)
    theirs = backward(reads.indices.long(), table.detach(), reads.weights, reads.grad)
    for name, ours, other in zip(
        ("table", "weights"), (table.grad, weights.grad), theirs, strict=True
    ):
        error = (ours.float() - other.float()).norm() / ours.float().norm()
        if not error < 2e-2:  # bf16 keeps 8 bits, which sums of a few reads hardly lose
            raise AssertionError(f"the reference's gradient of {name} differs from ours: {error}")


def _fbgemm(setting: Setting, bag: Bag, name: str) -> Iterator[Row]:
    """FBGEMM's table-batched embedding: weighted pooling, SGD fused into its backward."""
    row = Row(what="bag forward + backward, rows", case=name, against="FBGEMM (with SGD)")
    if importlib.util.find_spec("fbgemm_gpu") is None:
        yield dataclasses.replace(row, note="FBGEMM: the package fbgemm_gpu is not installed")
        return
    if setting.device.type != "cuda":
        yield dataclasses.replace(row, note="FBGEMM: compared on a GPU only")
        return
    empty_cache(setting)
    table = random_table(bag.rows, bag.columns, torch.float16, setting.device).requires_grad_()
    contenders = {"ours": _our_rows_step(table), "fbgemm": _fbgemm_step(bag)}
    draw = partial(draw_reads, bag, "uniform", torch.float16, setting.device)
    samples = setting.compare(contenders, draw)
    yield dataclasses.replace(
        row,
        ours=samples["ours"].median,
        spread=samples["ours"].spread,
        theirs=samples["fbgemm"].median,
        floor=setting.floor(bag.forward(), bag.backward("rows", 2)),
    )


def _our_rows_step(table: Tensor) -> Contender:
    def run(watch: Stopwatch, reads: Reads) -> None:
        weights = reads.weights.detach().requires_grad_()
        with watch:
            rows = RowGradients.empty(table, reads.indices.numel(), table.dtype)
            weighted_bag(table, reads.indices, weights, row_gradients=rows).backward(reads.grad)

    return run


def _fbgemm_step(bag: Bag) -> Contender:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    tables = SplitTableBatchedEmbeddingBagsCodegen(
        [(bag.rows, bag.columns, EmbeddingLocation.DEVICE, ComputeDevice.CUDA)],
        optimizer=EmbOptimType.EXACT_SGD,
        learning_rate=1e-4,
        weights_precision=SparseType.FP16,
        output_dtype=SparseType.FP16,
        pooling_mode=PoolingMode.SUM,
    )

    def run(watch: Stopwatch, reads: Reads) -> None:
        weights = reads.weights.float().flatten().requires_grad_()
        indices = reads.indices.long().flatten()
        offsets = torch.arange(bag.tokens + 1, device=indices.device) * bag.bag
        with watch:
            tables(indices, offsets, per_sample_weights=weights).backward(reads.grad)

    return run
