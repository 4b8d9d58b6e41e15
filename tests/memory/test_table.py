"""The value table's chunks and gradient: where it goes, when it is reported, what may be frozen."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_memory.config import RecomputeConfig
from megatron_memory.memory import table as table_module
from megatron_memory.memory.table import ValueTable
from tests.tiny import tiny_batch, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

CHUNKINGS = {"one chunk": 2**28, "chunks": 10 * 32 + 31}
"""Elements of a chunk: the tiny table has 64 rows of 32 columns."""


@pytest.fixture(params=CHUNKINGS, autouse=True)
def chunking(request, monkeypatch) -> str:
    """Every test runs with whole tables, and with tables in chunks."""
    monkeypatch.setattr(table_module, "MAX_CHUNK_ELEMENTS", CHUNKINGS[request.param])
    return request.param


def whole(table: ValueTable) -> torch.Tensor:
    """[S, D], a copy."""
    return torch.cat([chunk.detach() for chunk in table.chunks])


def main_grad(table: ValueTable) -> torch.Tensor:
    """[S, D], a copy."""
    return torch.cat([chunk.main_grad for chunk in table.chunks])


RECOMPUTES = {
    "none": RecomputeConfig(),
    "full": RecomputeConfig(
        recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    ),
    "mlp": RecomputeConfig(
        recompute_granularity="selective", recompute_modules=("core_attn", "mlp")
    ),
}


def wrap(model) -> DistributedDataParallel:
    """Megatron's wrapper, which gives every parameter that learns a `main_grad`."""
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    return ddp


def backward(model, *seeds: int) -> None:
    """Forward and backward of a microbatch for each seed."""
    for seed in seeds or (5,):
        model(**tiny_batch(seed)).sum().backward()


def value_gradients(model) -> list[torch.Tensor]:
    return [main_grad(table) for table in model.memory.tables()]


def record_reports(model) -> list[list[torch.Tensor]]:
    """For each table, its gradient at each of the reports to come."""
    reports = []
    for table in model.memory.tables():
        seen: list[torch.Tensor] = []
        table.on_gradient_ready = lambda table=table, seen=seen: seen.append(main_grad(table))
        reports.append(seen)
    return reports


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_gradient_is_reported_once_a_microbatch_and_complete(variant, scope, recompute):
    config = tiny_config(variant, memory={"share_scope": scope}, recompute=RECOMPUTES[recompute])
    model = tiny_model(config)
    reports = record_reports(model)
    assert len(reports) == (1 if scope == "model" else 2) * (2 if variant == "peer" else 1)
    ddp = wrap(model)
    for microbatch in range(3):
        backward(ddp, microbatch)
        for seen, gradient in zip(reports, value_gradients(model), strict=True):
            assert len(seen) == microbatch + 1
            assert torch.equal(seen[-1], gradient)
            assert gradient.any()


@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_main_grad_is_the_gradient_of_autograd(variant: str):
    """Without DDP the module works as any other does."""
    config = tiny_config(variant)
    plain, model = tiny_model(config), tiny_model(config)
    backward(plain, 1, 2)
    backward(wrap(model), 1, 2)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.main_grad, theirs.grad, rtol=1e-5, atol=1e-6)
        assert theirs.grad.any()
    assert all(chunk.grad is None for table in model.memory.tables() for chunk in table.chunks)


def test_evaluation_between_microbatches_is_not_counted():
    model = tiny_model(tiny_config("memory+"))
    reports = record_reports(model)
    ddp = wrap(model)
    with torch.no_grad():
        ddp(**tiny_batch())
    ddp(**tiny_batch())  # a loss that nobody goes backward from
    assert not reports[0]
    backward(ddp)
    assert len(reports[0]) == 1


@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_frozen_table(variant: str):
    config = tiny_config(variant)
    model, learning = tiny_model(config), tiny_model(config)
    for table in model.memory.tables():
        table.requires_grad_(False)
    reports = record_reports(model)
    backward(wrap(model))
    backward(wrap(learning))
    for table, seen in zip(model.memory.tables(), reports, strict=True):
        for chunk in table.chunks:
            assert not hasattr(chunk, "main_grad")
            assert chunk.grad is None
        assert not seen
    others = dict(learning.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.main_grad, others[name].main_grad), name


@pytest.mark.parametrize("frozen", [0, 1], ids=["u", "v"])
def test_one_of_peers_tables_frozen(frozen: int):
    config = tiny_config("peer")
    model, learning = tiny_model(config), tiny_model(config)
    model.memory.tables()[frozen].requires_grad_(False)
    reports = record_reports(model)
    backward(wrap(model))
    backward(wrap(learning))
    assert [len(seen) for seen in reports] == [frozen, 1 - frozen]
    ours, theirs = (m.memory.tables()[1 - frozen] for m in (model, learning))
    torch.testing.assert_close(main_grad(ours), main_grad(theirs), rtol=1e-5, atol=1e-6)
    assert main_grad(ours).any()


@pytest.mark.parametrize("wrapped", [True, False], ids=["ddp", "autograd"])
@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_everything_frozen_but_the_tables(variant: str, wrapped: bool):
    """As in sparse memory finetuning: the gradient must reach the tables of the first layer too."""
    config = tiny_config(variant, memory={"share_scope": "layer"})
    model, learning = tiny_model(config), tiny_model(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("memory."))
    backward(wrap(model) if wrapped else model)
    backward(wrap(learning))
    for table, gradient in zip(model.memory.tables(), value_gradients(learning), strict=True):
        ours = main_grad(table) if wrapped else torch.cat([c.grad for c in table.chunks])
        torch.testing.assert_close(ours, gradient, rtol=1e-6, atol=1e-7)


def test_rows_that_nobody_read_keep_their_gradient():
    """The buffer is added to where rows were read, and nowhere else."""
    model = tiny_model(tiny_config("memory+", memory={"num_half_keys": 32}))
    ddp = wrap(model)
    backward(ddp)
    (table,) = model.memory.tables()
    read = main_grad(table).any(dim=1)
    assert 0 < read.sum() < len(read)
    for chunk, rows in zip(table.chunks, read.split(len(table.chunks[0])), strict=True):
        chunk.main_grad[~rows] = float("nan")
    backward(ddp)
    assert main_grad(table)[~read].isnan().all()
    assert not main_grad(table)[read].isnan().any()


@pytest.mark.parametrize("scope, copies", [("model", 1), ("layer", 2)])
def test_a_table_is_of_the_model_once(scope: str, copies: int, chunking: str):
    model = tiny_model(tiny_config("memory+", memory={"share_scope": scope}))
    copies *= 7 if chunking == "chunks" else 1
    tables = [
        name for name, _ in model.named_parameters(remove_duplicate=False) if "values" in name
    ]
    assert len(tables) == copies
    assert len([name for name in model.state_dict() if "values" in name]) == copies
    assert all(name.startswith("memory.") for name in tables)


def test_marks_that_megatron_reads():
    (table,) = tiny_model(tiny_config("memory+")).memory.tables()
    for chunk in table.chunks:
        assert chunk.allreduce is False
        assert chunk.is_memory_value
        assert chunk.tensor_model_parallel
        assert chunk.partition_dim == 1


def test_chunks_are_even(chunking: str):
    (table,) = tiny_model(tiny_config("memory+")).memory.tables()
    rows = [len(chunk) for chunk in table.chunks]
    names = [name for name, _ in table.named_parameters()]
    if chunking == "one chunk":
        assert (rows, names) == ([64], ["weight"])
    else:  # of at most ten rows
        assert rows == [10, 10, 10, 10, 10, 10, 4]
        assert names == [f"weight_{i}" for i in range(7)]


@pytest.mark.parametrize(
    "num_rows, columns, num_chunks",
    [(2**20, 2048, 8), (2**20, 256, 1), (2**20, 257, 2), (2**24, 4096, 256), (1009**2, 1000, 4)],
)
def test_large_tables_stay_below_the_limit(num_rows, columns, num_chunks, monkeypatch):
    monkeypatch.undo()
    *rows, last = table_module._chunk_rows(num_rows, columns)
    assert (len(rows) + 1, sum(rows) + last) == (num_chunks, num_rows)
    assert max([*rows, last]) * columns <= 2**28
    assert len(set(rows)) <= 1 and last <= max([*rows, last])
    # As even as can be: no chunk is short by more than one row for each of the others.
    assert all(size - last < num_chunks for size in rows)


@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_chunks_change_neither_initial_values_nor_results(variant: str, monkeypatch):
    """The same numbers in the same order: equal to the bit."""
    config = tiny_config(variant)
    runs = []
    for elements in CHUNKINGS.values():
        monkeypatch.setattr(table_module, "MAX_CHUNK_ELEMENTS", elements)
        model = tiny_model(config)
        losses = wrap(model)(**tiny_batch())
        losses.sum().backward()
        tables = model.memory.tables()
        runs.append([losses, *map(whole, tables), *map(main_grad, tables)])
    for one, many in zip(*runs, strict=True):
        assert torch.equal(one, many)
        assert one.any()
