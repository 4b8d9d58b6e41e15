"""Which layers share a table, on which pipeline ranks, and what is proposed where they are on
several."""

import dataclasses

import pytest

from megatron_memory.config import check_config
from megatron_memory.config.pipeline import (
    pipeline_stages,
    rank_of_layers,
    without_stage_flags,
)
from megatron_memory.config.pools import memory_pools, pool_ranks, with_share_groups
from megatron_memory.exceptions import ConfigurationError
from tests.config.helpers import parse

PP = "--pipeline-model-parallel-size"


def config(arguments: str, num_layers: int = 24):
    return parse(f"--num-layers {num_layers} {arguments}", without=("--num-layers",))


def pools(arguments: str, num_layers: int = 24) -> dict[str, tuple[int, ...]]:
    return {pool.name: pool.layers for pool in memory_pools(config(arguments, num_layers))}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--memory-layers 4,12,20", {"shared": (4, 12, 20)}),
        (
            "--memory-layers 4,12 --memory-share-scope layer",
            {"layer_4": (4,), "layer_12": (12,)},
        ),
        ("--memory-layers 4 --memory-share-scope layer", {"layer_4": (4,)}),
        ("--memory-layers 4,12,20 --memory-share-scope stage", {"shared": (4, 12, 20)}),
        (
            f"--memory-layers 4,12,20 --memory-share-scope stage {PP} 2",
            {"layer_4": (4,), "layers_12_20": (12, 20)},
        ),
        # Stages of a rank, not of the model: interleaved, all three are on rank 2.
        (
            f"--memory-layers 4,12,20 --memory-share-scope stage {PP} 4 "
            "--num-layers-per-virtual-pipeline-stage 2",
            {"shared": (4, 12, 20)},
        ),
        (
            "--memory-layers 4,12,20 --memory-share-scope stage --memory-share-groups 20,4;12",
            {"layers_4_20": (4, 20), "layer_12": (12,)},
        ),
    ],
)
def test_pools(arguments: str, expected: dict):
    assert pools(arguments) == expected


def test_tables_of_a_model_have_different_numbers():
    for arguments in ("", "--memory-share-scope layer", f"--memory-share-scope stage {PP} 4"):
        numbers = [p.number for p in memory_pools(config("--memory-layers 0,12,20 " + arguments))]
        assert len(set(numbers)) == len(numbers)


def test_written_down_groups_mean_the_same_tables_without_the_pipeline():
    trained = config(f"--memory-layers 4,12,20 --memory-share-scope stage {PP} 2")
    saved = with_share_groups(trained)
    assert saved.memory.share_groups == "4;12,20"
    elsewhere = config(
        "--memory-layers 4,12,20 --memory-share-scope stage --memory-share-groups 4;12,20"
    )
    assert memory_pools(elsewhere) == memory_pools(trained)


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_only_stage_scope_writes_groups_down(scope: str):
    saved = with_share_groups(config(f"--memory-layers 4,12 --memory-share-scope {scope}"))
    assert saved.memory.share_groups is None


def test_ranks_with_a_copy():
    model = config(f"--memory-layers 4,12,20 {PP} 4")
    assert [pool_ranks(model, pool) for pool in memory_pools(model)] == [(0, 2, 3)]


@pytest.mark.parametrize("groups", ["4,12", "4,12;20;21", "4;4,12,20", "4,twelve;20", "4;;12,20"])
def test_groups_that_do_not_fit(groups: str):
    with pytest.raises(ConfigurationError, match="--memory-share-groups"):
        pools(f"--memory-layers 4,12,20 --memory-share-scope stage --memory-share-groups {groups}")


def problem(arguments: str, world_size: int, num_layers: int = 24) -> str:
    with pytest.raises(ConfigurationError) as error:
        check_config(config(arguments, num_layers), world_size)
    return str(error.value)


def test_groups_are_for_stage_scope():
    message = problem("--memory-layers 4,12 --memory-share-groups 4;12", 1)
    assert "--memory-share-groups 4;12 belongs to --memory-share-scope stage" in message


def test_a_pool_on_several_ranks_lists_layers_ranks_and_ways_out():
    message = problem(f"--memory-layers 4,12,20 {PP} 4", 4)
    assert "layer 4 on rank 0, layer 12 on rank 2, layer 20 on rank 3" in message
    for way in (
        "--num-layers-per-virtual-pipeline-stage 2: all on rank 2, 3 stages a rank",
        "--memory-layers 12,13,17",
        "--memory-share-scope stage: another model, with 3 tables",
        "--memory-share-scope layer: another model, with 3 tables",
        "--memory-replicate-pool: a copy of the table on each of 3 ranks",
    ):
        assert way in message


@pytest.mark.parametrize(
    ("layers", "num_layers", "num_ranks"),
    [
        ("4,12,20", 24, 2),
        ("4,12,20", 24, 4),
        ("4,12,20", 24, 8),
        ("8,16,24", 32, 4),
        ("3,9,17", 24, 4),
        ("2,5,9", 12, 3),
        ("5,6,20", 24, 2),
        ("1,3", 4, 2),
    ],
)
def test_every_proposal_works(layers: str, num_layers: int, num_ranks: int):
    """What the error proposes is tried, flag by flag, until nothing is wrong."""
    arguments = f"--memory-layers {layers} {PP} {num_ranks} --global-batch-size 48"
    message = problem(arguments, num_ranks, num_layers)
    ways = [line.strip()[2:] for line in message.splitlines() if line.startswith("  * ")]
    assert len(ways) >= 4
    for way in ways:
        flag, _, value = way.split(":")[0].partition(" ")
        value = value.strip('"')
        tried = f"{arguments} {flag} {value}"
        if flag == "--memory-layers":
            tried = tried.replace(f"--memory-layers {layers}", "", 1)
        check_config(config(tried, num_layers), num_ranks)


def test_proposals_for_given_groups_work():
    """As a checkpoint's config.yaml has them: every way out changes what stands in the way."""
    groups = "--memory-share-groups 4,12;20"
    arguments = f"--memory-layers 4,12,20 --memory-share-scope stage {PP} 4 --global-batch-size 48"
    message = problem(f"{arguments} {groups}", 4)
    ways = [line.strip()[2:] for line in message.splitlines() if line.startswith("  * ")]
    flags = [way.partition(": ")[0].replace('"', "") for way in ways]
    assert "--memory-share-groups 4;12;20" in flags and "--memory-replicate-pool" in flags
    for flag in flags:
        kept = "" if flag.startswith("--memory-share-groups") else groups
        check_config(config(f"{arguments} {kept} {flag}"), 4)


def test_a_layout_is_proposed_where_equal_stages_do_not_do():
    message = problem(f"--memory-layers 7,8,16 {PP} 2", 2)
    layout = message.split('--pipeline-model-parallel-layout "')[1].split('"')[0]
    planned = config(f"--memory-layers 7,8,16 {PP} 2")
    parallel = without_stage_flags(planned.parallel)
    parallel = dataclasses.replace(parallel, pipeline_model_parallel_layout=layout)
    stages = pipeline_stages(planned.model, parallel)
    rank_of = rank_of_layers(stages)
    assert len({rank_of[layer] for layer in (7, 8, 16)}) == 1
    sizes = [len(stage.layers) for stage in stages]
    assert max(sizes) - min(sizes) <= 2


def test_proposals_say_what_must_go():
    layout = "Et*8|t*8L"
    message = problem(
        f"--memory-layers 4,12 {PP} 2 --pipeline-model-parallel-layout {layout} "
        "--memory-share-scope stage --memory-share-groups 4,12",
        2,
        16,
    )
    assert "in place of --pipeline-model-parallel-layout:" in message
    assert '--memory-share-groups "4;12": another model, with 2 tables' in message


def test_replicas_are_allowed_when_asked_for():
    check_config(config(f"--memory-layers 4,12,20 {PP} 4 --memory-replicate-pool"), 4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--global-batch-size 2", ["needs at least 4 microbatches", "there are 2"]),
        ("--global-batch-size 6", ["2 are left after groups of 4", "multiple of 4"]),
        (
            "--global-batch-size 8 --microbatch-group-size-per-virtual-pipeline-stage 2",
            ["per-virtual-pipeline-stage 2 is smaller than", "size 4"],
        ),
    ],
)
def test_microbatches_of_interleaved_stages(arguments: str, parts: list[str]):
    message = problem(
        f"{PP} 4 --num-layers-per-virtual-pipeline-stage 2 {arguments}".replace("  ", " "), 4
    )
    for part in parts:
        assert part in message
