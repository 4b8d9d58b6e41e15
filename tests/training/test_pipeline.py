"""Pipelines beyond the matrix of tests/parallel: the program, checkpoints that move between
pipelines, microbatches that do not fit the ranks, baselines without memory, and slot usage.
"""

import dataclasses
from pathlib import Path

import pytest

from megatron_memory.config import Config, load_config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training import trainer
from megatron_memory.training.metrics import Report
from tests.distributed import run_ranks
from tests.full_tensors import assemble
from tests.parallel.runs import assert_equal_runs, train
from tests.tiny import tiny_config
from tests.training import tiny_runs
from tests.training.tiny_runs import change, run

pytestmark = pytest.mark.distributed

PP2 = {"pipeline_model_parallel_size": 2}
MEMORY = {"layers": "1,3", "num_heads": 2, "top_k": 4, "num_half_keys": 8}


def one_rank_and_start(config: Config) -> tuple[dict, dict]:
    reference = run_ranks(train, 1, config, None)[0]
    return reference, assemble([reference["start"]])


@pytest.mark.parametrize("layout", ["Et|tt|tL", "Ett||ttL"])
def test_microbatches_need_not_fit_the_ranks(layout: str):
    """Four microbatches over three ranks, whose stages have one, two and one layers, or none."""
    reference, start = one_rank_and_start(tiny_config("memory+"))
    config = tiny_config(
        "memory+",
        {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": layout},
        memory={"replicate_pool": True},
    )
    assert_equal_runs(run_ranks(train, 3, config, start), reference)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("num_experts", [None, 2], ids=["dense", "moe"])
def test_baseline_without_memory_equals_one_rank(num_experts: int | None, chunks: int):
    options = {"model": {"num_experts": num_experts}}
    reference, start = one_rank_and_start(tiny_config(None, **options))
    parallel = PP2 | {"num_virtual_stages_per_pipeline_rank": chunks}
    ranks = run_ranks(train, 2, tiny_config(None, parallel, **options), start)
    for seen in ranks:
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        assert [norm for norm, _ in seen["norms"]] == pytest.approx(
            [norm for norm, _ in reference["norms"]], rel=1e-4
        )


def program_config(dataset: str, **changes) -> Config:
    """Four layers, two with a memory; Adam's eps is far above the noise of sums' order."""
    return tiny_runs.tiny_config(
        dataset,
        model={"num_layers": 4},
        memory=MEMORY | changes.pop("memory", {}),
        optimizer=dict(lr=1e-2, lr_decay_iters=20, adam_eps=1e-4),
        training=dict(micro_batch_size=2, global_batch_size=8, train_iters=20, eval_iters=0),
        **changes,
    )


def test_tables_of_stages_continue_without_a_pipeline(dataset: str, tmp_path: Path):
    """`--memory-share-scope stage` at PP 2 is two tables; the checkpoint says which, so that one
    rank goes on with the same ones, and a pipeline that would make one table is refused."""
    save = str(tmp_path / "checkpoints")
    plain = program_config(dataset, memory={"share_scope": "stage"})
    first = change(change(plain, "parallel", **PP2), "checkpoint", save=save)
    run_ranks(run, 2, change(first, "training", exit_interval=3))

    written = load_config(Path(save) / "config.yaml")
    assert written.memory.share_groups == "1;3"
    second = change(plain, "memory", share_groups="1;3")
    second = change(change(second, "checkpoint", load=save), "training", exit_interval=6)
    one = run_ranks(run, 1, second)[0]
    again = change(change(first, "checkpoint", save=None, load=save), "training", exit_interval=6)
    two = run_ranks(run, 2, again)[0]
    assert one.iterations == two.iterations == [4, 5, 6]
    assert one.losses == pytest.approx(two.losses, abs=2e-5)

    ungrouped = change(second, "memory", share_groups=None)
    message = run_ranks(_checkpoint_error, 1, ungrouped)[0]
    assert "--memory-share-groups 1;3 there, 1,3 here" in message


def _checkpoint_error(config: Config) -> str:
    with pytest.raises(CheckpointError) as error:
        run(config)
    return str(error.value)


def _reports(config: Config) -> list[Report]:
    reports: list[Report] = []
    original = trainer.report_line

    def keep(report: Report, train_iters: int) -> str:
        reports.append(report)
        return original(report, train_iters)

    trainer.report_line = keep
    run(config)
    return reports


@pytest.mark.parametrize(
    ("parallel", "memory", "tables"),
    [
        (PP2, {"replicate_pool": True}, ["pool"]),
        (PP2 | {"num_virtual_stages_per_pipeline_rank": 2}, {}, ["pool"]),
        (PP2, {"share_scope": "layer"}, []),
    ],
)
def test_usage_is_of_all_stages(parallel: dict, memory: dict, tables: list, dataset: str):
    """Reported on every rank; the slots read in the first step follow from the weights alone, which
    stages draw differently from one rank: so only what must be there is compared."""
    config = program_config(dataset, parallel={"device": "cpu"} | parallel, memory=memory)
    config = change(config, "training", exit_interval=1)
    first, second = run_ranks(_reports, 2, config)
    (report,) = first
    assert list(report.usage) == ["layer_1", "layer_3", *tables]
    assert [dataclasses.asdict(f) for f in report.usage.values()] == [
        dataclasses.asdict(f) for f in second[0].usage.values()
    ]
    layers = [report.usage[name] for name in ("layer_1", "layer_3")]
    assert all(0 < figures.share_of_slots_read <= 1 for figures in layers)
    for name in tables:
        share = report.usage[name].share_of_slots_read
        assert share >= max(figures.share_of_slots_read for figures in layers)
    assert report.loss == second[0].loss and report.last == second[0].last


def test_evaluation_takes_the_microbatches_of_steps(dataset: str):
    """Groups of three microbatches: five leave two, which two ranks can do; ten would leave one."""
    parallel = PP2 | {
        "device": "cpu",
        "num_virtual_stages_per_pipeline_rank": 2,
        "microbatch_group_size_per_virtual_pipeline_stage": 3,
    }
    config = program_config(dataset, parallel=parallel)
    config = change(config, "training", global_batch_size=10, eval_iters=2, exit_interval=1)
    first, second = run_ranks(run, 2, config)
    assert first.losses == second.losses and first.iterations == [1]
