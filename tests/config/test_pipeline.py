"""Layers to pipeline ranks: against megatron-core's own arithmetic, and every refusal."""

import re

import pytest
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from megatron_memory.config.pipeline import Stage, layout_text, num_chunks, rank_of_layers
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.runtime import prepare_megatron
from tests.config.helpers import parse

prepare_megatron("cpu")

VIRTUAL = "--num-virtual-stages-per-pipeline-rank"
LAYOUT = "--pipeline-model-parallel-layout"


def stages(arguments: str, num_layers: int) -> tuple[Stage, ...]:
    return parse(f"--num-layers {num_layers} {arguments}", without=("--num-layers",)).stages


def sizes(arguments: str, num_layers: int) -> list[int]:
    return [len(stage.layers) for stage in stages(arguments, num_layers)]


def test_one_stage_has_everything():
    (stage,) = stages("", 4)
    assert stage == Stage(rank=0, chunk=0, layers=(0, 1, 2, 3), has_embedding=True, has_loss=True)


@pytest.mark.parametrize(
    ("arguments", "num_layers", "expected"),
    [
        ("--pipeline-model-parallel-size 2", 8, [4, 4]),
        ("--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2", 8, [2] * 4),
        (f"--pipeline-model-parallel-size 2 {VIRTUAL} 4", 8, [1] * 8),
        (f"--pipeline-model-parallel-size 2 {VIRTUAL} 1", 8, [4, 4]),
        ("--pipeline-model-parallel-size 4 --decoder-first-pipeline-num-layers 2", 8, [2, 2, 2, 2]),
        ("--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 0", 8, [0, 4, 4]),
        ("--pipeline-model-parallel-size 3 --decoder-last-pipeline-num-layers 2", 8, [3, 3, 2]),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3 "
            "--decoder-last-pipeline-num-layers 5",
            8,
            [3, 5],
        ),
        (
            f"--pipeline-model-parallel-size 3 {VIRTUAL} 2 --decoder-first-pipeline-num-layers 2 "
            "--decoder-last-pipeline-num-layers 4",
            12,
            [1, 3, 2, 1, 3, 2],
        ),
        (
            "--pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split",
            14,
            [3, 4, 4, 3],
        ),
        (
            f"--pipeline-model-parallel-size 2 {VIRTUAL} 2 --account-for-loss-in-pipeline-split",
            7,
            [2, 2, 2, 1],
        ),
    ],
)
def test_sizes_are_megatrons(arguments: str, num_layers: int, expected: list[int]):
    """By hand from Megatron-LM's description of its flags; test_gpt builds them."""
    found = stages(arguments, num_layers)
    assert [len(stage.layers) for stage in found] == expected
    assert [layer for stage in found for layer in stage.layers] == list(range(num_layers))
    num_ranks = len(found) // num_chunks(found)
    assert [stage.rank for stage in found] == [*range(num_ranks)] * num_chunks(found)
    assert [stage.has_embedding for stage in found] == [True] + [False] * (len(found) - 1)
    assert [stage.has_loss for stage in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize(
    ("layout", "num_ranks", "num_layers"),
    [
        ("Et*3|t*5L", 2, 8),
        ("E|(tt|)*3,L", 5, 6),
        ("Ett|(tt|)*2,ttL", 2, 8),
        ("E,t|ttt|t*2|t*2L", 4, 8),
        ("Et|(tt|t|)*2tL", 2, 8),
    ],
)
def test_layouts_are_read_as_megatron_core_reads_them(layout, num_ranks, num_layers):
    theirs = PipelineParallelLayerLayout.parse_str_to_list(layout)
    ours = sizes(f"--pipeline-model-parallel-size {num_ranks} {LAYOUT} {layout}", num_layers)
    assert ours == [sum(kind.name == "decoder" for kind in stage) for stage in theirs]
    assert (
        sizes(
            f"--pipeline-model-parallel-size {num_ranks} {LAYOUT} {layout_text(ours)}", num_layers
        )
        == ours
    )


def test_ranks_of_layers_with_interleaving():
    found = stages("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2", 24)
    rank_of = rank_of_layers(found)
    # design: stride 8 lands on one rank, the paper's own.
    assert [layer for layer in rank_of if rank_of[layer] == 2] == [4, 5, 12, 13, 20, 21]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--pipeline-model-parallel-size 3", ["--num-layers 8", "size 3", "multiple of 3"]),
        (f"--pipeline-model-parallel-size 2 {VIRTUAL} 3", ["x 3 virtual stages", "multiple of 6"]),
        (
            "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
            ["not a multiple of", "= 6"],
        ),
        (
            f"--pipeline-model-parallel-size 2 {VIRTUAL} 2 "
            "--num-layers-per-virtual-pipeline-stage 2",
            ["say the same thing"],
        ),
        (f"{VIRTUAL} 2", ["2 or more"]),
        (f"{LAYOUT} Et*4|t*4L", ["2 stages", "--pipeline-model-parallel-size is 1"]),
        ("--decoder-first-pipeline-num-layers 2", ["2 or more"]),
        (
            "--pipeline-model-parallel-size 3 --decoder-first-pipeline-num-layers 3",
            ["leaves 5 layers for 2 pipeline ranks"],
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3 "
            "--decoder-last-pipeline-num-layers 4",
            ["leaves 1 layers for 0 pipeline ranks"],
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 9",
            ["leaves -1 layers"],
        ),
        (
            f"--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 3 {VIRTUAL} 2",
            ["has 3 layers", f"{VIRTUAL} 2"],
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 "
            "--num-layers-per-virtual-pipeline-stage 2",
            ["give --num-virtual-stages-per-pipeline-rank instead"],
        ),
        (
            "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 "
            "--account-for-loss-in-pipeline-split",
            ["leave either away"],
        ),
        (f"--pipeline-model-parallel-size 2 {LAYOUT} Et*8L", ["1 stages", "multiple of"]),
        (f"--pipeline-model-parallel-size 2 {LAYOUT} Et*4|t*3L", ["has 7 layers", "is 8"]),
        (f"--pipeline-model-parallel-size 2 {LAYOUT} t*4|Et*4L", ["one E, then layers"]),
        (f"--pipeline-model-parallel-size 2 {LAYOUT} Et*4|mt*4L", ["one E, then layers"]),
        (
            f"--pipeline-model-parallel-size 2 {LAYOUT} Et*4|t*4L {VIRTUAL} 2",
            [LAYOUT, VIRTUAL, "leave one of them away"],
        ),
    ],
)
def test_refusals_name_the_flags_and_the_way_out(arguments: str, parts: list[str]):
    with pytest.raises(ConfigurationError) as error:
        stages(arguments, 8)
    for part in parts:
        assert part in str(error.value)


def test_every_field_that_says_a_stages_layers_is_refused_beside_a_layout():
    flags = [
        "--num-layers-per-virtual-pipeline-stage 2",
        "--num-virtual-stages-per-pipeline-rank 2",
        "--decoder-first-pipeline-num-layers 4",
        "--decoder-last-pipeline-num-layers 4",
        "--account-for-embedding-in-pipeline-split",
        "--account-for-loss-in-pipeline-split",
    ]
    for flag in flags:
        with pytest.raises(ConfigurationError, match=re.escape(flag.split()[0])):
            stages(f"--pipeline-model-parallel-size 2 {LAYOUT} Et*4|t*4L {flag}", 8)


@pytest.mark.parametrize("layout", ["Et*1000000000|L", "E(t*9|)*99999999tL", "Et*" + "9" * 5000])
def test_a_layout_that_would_fill_the_memory_is_refused(layout: str):
    with pytest.raises(ConfigurationError, match="is longer than 65536 parts"):
        stages(f"--pipeline-model-parallel-size 2 {LAYOUT} {layout}", 8)
