"""Checks of the memory layers' settings."""

import pytest

from megatron_memory.config import check_config
from tests.config.helpers import parse
from tests.config.test_checks import assert_one_problem, problem


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--memory-layers 4", ("--memory-layers 4", "--num-layers 4")),
        ("--memory-layers 1,x", ("--memory-layers 1,x",)),
        ("--memory-layers 1,1", ("--memory-layers 1,1", "twice")),
        ("--memory-layers 1 --memory-key-dim 7", ("--memory-key-dim 7", "odd", "Choose 8")),
        (
            "--memory-layers 1 --memory-value-dim 6",
            ("--memory-key-dim 3", "odd", "Choose 4"),
        ),
        (
            "--memory-layers 1 --memory-top-k 17 --memory-num-half-keys 16",
            ("--memory-top-k 17", "--memory-num-half-keys 16", "Lower the first"),
        ),
        (
            "--memory-layers 1 --memory-num-half-keys 4 --memory-top-k 4 "
            "--memory-num-random-values 17",
            ("--memory-num-random-values 17", "16 rows", "--memory-num-half-keys 4", "lower it"),
        ),
        (
            "--memory-layers 1 --memory-variant peer --memory-value-dim 48",
            ("--memory-value-dim 48", "--hidden-size 64", "--memory-variant peer"),
        ),
        (
            "--memory-layers 1 --num-experts 4",
            ("--memory-layers 1", "--num-experts 4", "leave one"),
        ),
        (
            "--memory-layers 1 --memory-fp8-values",
            ("--memory-fp8-values", "fp32", "add --bf16"),
        ),
        (
            "--memory-layers 1 --memory-value-min-lr 1",
            ("--memory-value-min-lr 1.0", "--memory-value-lr 0.001", "lower it"),
        ),
    ],
)
def test_memory(arguments, parts):
    assert_one_problem(problem(arguments), parts)


@pytest.mark.parametrize(
    ("value_dim", "ranks", "fix"), [(50, 4, "48 or 52"), (66, 4, "64 or 68"), (2, 4, "4")]
)
def test_columns_that_cannot_be_split(value_dim, ranks, fix):
    message = problem(
        f"--memory-layers 1 --memory-value-dim {value_dim} --memory-key-dim 8 "
        f"--tensor-model-parallel-size {ranks}",
        world_size=4,
    )
    assert_one_problem(
        message,
        (
            f"--memory-value-dim {value_dim}",
            f"--tensor-model-parallel-size {ranks}",
            f"Choose for example {fix}.",
        ),
    )


@pytest.mark.parametrize(
    ("arguments", "world_size", "parts"),
    [
        (
            "--memory-value-dim 90 --memory-key-dim 8 --memory-parallel-size 4",
            4,
            ("--memory-value-dim 90", "x --memory-parallel-size 4 = 4:", "for example 88 or 92."),
        ),
        (
            "--memory-parallel-size 4 --tensor-model-parallel-size 2 --memory-value-dim 128",
            8,
            ("--memory-value-dim 128", "2 x --memory-parallel-size 4 = 8)", "16 columns")
            + ("Give --memory-parallel-size 2, or", "at least --memory-value-dim 256."),
        ),
        (
            "--memory-parallel-size 2 --tensor-model-parallel-size 2",
            4,
            ("--memory-value-dim 64", "16 columns", "Give --memory-parallel-size 1, or"),
        ),
        (
            "--memory-parallel-size 4 --memory-value-dim 128 --tensor-model-parallel-size 2",
            4,
            ("4 processes", "2 data-parallel ranks", "--tensor-model-parallel-size 2")
            + ("--memory-parallel-size 4", "multiple of 8 processes")
            + ("give --memory-parallel-size 2.",),
        ),
    ],
)
def test_columns_over_data_parallel_neighbours(arguments, world_size, parts):
    arguments = f"--memory-layers 1 --global-batch-size 24 {arguments}"
    message = problem(arguments, world_size)
    for part in parts:
        assert part in message


def test_memory_parallel_sizes_that_work():
    for neighbours in (1, 2):
        flags = f"--memory-layers 1 --memory-parallel-size {neighbours}"
        check_config(parse(flags), world_size=4)


@pytest.mark.parametrize("kernels", ["auto", "triton", "torch"])
def test_kernels_are_chosen_by_the_machine_that_runs_it(kernels: str):
    config = parse(f"--memory-layers 1 --memory-kernels {kernels} --memory-fp8-values --bf16")
    check_config(config, 1)
    assert config.memory.kernels == kernels and config.memory.fp8_values


def test_settings_of_a_memory_that_is_turned_off_do_not_matter():
    check_config(parse("--memory-layers none --memory-key-dim 7 --num-experts 2"), 1)
