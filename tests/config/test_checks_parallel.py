"""Checks of the parallel sizes."""

import pytest

from megatron_memory.config import check_config
from tests.config.helpers import parse
from tests.config.test_checks import assert_one_problem, problem


@pytest.mark.parametrize(
    ("arguments", "world_size", "parts"),
    [
        (
            "--pipeline-model-parallel-size 3",
            3,
            ("--num-layers 4", "--pipeline-model-parallel-size 3", "multiple of 3"),
        ),
        (
            "--pipeline-model-parallel-size 2 --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 4",
            2,
            ("--recompute-num-layers 4", "a pipeline stage has 2", "choose a divisor"),
        ),
        (
            "--context-parallel-size 2 --transformer-impl local",
            2,
            ("--context-parallel-size 2", "--transformer-impl local", "transformer_engine"),
        ),
        (
            "--context-parallel-size 2 --seq-length 30",
            2,
            ("--seq-length 30", "2 x --context-parallel-size 2", "multiple of 4"),
        ),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 3 --sequence-parallel "
            "--num-attention-heads 3 --hidden-size 48 --ffn-hidden-size 96 --seq-length 32",
            6,
            (
                "--seq-length 32",
                "--context-parallel-size 2 x --tensor-model-parallel-size 3",
                "multiple of 12",
            ),
        ),
        (
            "--context-parallel-size 2 --reset-attention-mask",
            2,
            ("--reset-attention-mask", "--context-parallel-size 2", "leave one"),
        ),
        (
            "--recompute-activations --recompute-modules memory --memory-layers 1 "
            "--memory-variant pkm --memory-value-dim 128 --memory-parallel-size 2",
            2,
            ("--recompute-modules memory", "--memory-parallel-size 2", "Leave memory away"),
        ),
        (
            "--context-parallel-size 2",
            3,
            ("3 processes", "--context-parallel-size 2", "multiple of 2"),
        ),
        (
            "--context-parallel-size 2 --memory-layers 1 --memory-parallel-size 3 "
            "--memory-value-dim 96",
            4,
            (
                "4 data- and context-parallel ranks",
                "--memory-parallel-size 3",
                "multiple of 6",
                "--memory-parallel-size 1",
            ),
        ),
        (
            "--num-attention-heads 6 --hidden-size 48 --tensor-model-parallel-size 4 "
            "--num-query-groups 2",
            4,
            ("--num-attention-heads 6", "--tensor-model-parallel-size 4", "multiple of 4"),
        ),
        (
            "--ffn-hidden-size 30 --tensor-model-parallel-size 4",
            4,
            ("--ffn-hidden-size 30", "--tensor-model-parallel-size 4", "multiple of 4"),
        ),
        (
            "--num-experts 4 --moe-ffn-hidden-size 30 --tensor-model-parallel-size 4 "
            "--sequence-parallel",
            4,
            ("--moe-ffn-hidden-size 30", "--tensor-model-parallel-size 4", "multiple of 4"),
        ),
        (
            "--num-attention-heads 12 --hidden-size 96 --num-query-groups 6 "
            "--tensor-model-parallel-size 4",
            4,
            ("--num-query-groups 6", "--tensor-model-parallel-size 4", "change one"),
        ),
        (
            "--sequence-parallel",
            1,
            ("--sequence-parallel", "--tensor-model-parallel-size is 1", "--no-sequence-parallel"),
        ),
        (
            "--sequence-parallel --tensor-model-parallel-size 4 --seq-length 30",
            4,
            ("--seq-length 30", "--tensor-model-parallel-size 4", "multiple of 4"),
        ),
        (
            "--overlap-param-gather --overlap-grad-reduce",
            2,
            ("--overlap-param-gather", "needs --use-distributed-optimizer"),
        ),
        (
            "--overlap-param-gather --use-distributed-optimizer",
            2,
            ("--overlap-param-gather", "needs --overlap-grad-reduce"),
        ),
        (
            "--tensor-model-parallel-size 2",
            3,
            ("3 processes", "--tensor-model-parallel-size 2", "multiple of 2"),
        ),
        (
            "--tensor-model-parallel-size 4",
            2,
            ("2 processes", "--tensor-model-parallel-size 4", "multiple of 4"),
        ),
        (
            "--num-experts 4 --expert-model-parallel-size 4",
            2,
            ("2 processes", "2 data-parallel ranks", "--expert-model-parallel-size 4"),
        ),
        (
            "--micro-batch-size 3 --global-batch-size 8",
            2,
            (
                "--global-batch-size 8",
                "--micro-batch-size 3",
                "2 data-parallel ranks",
                "multiple of 6",
            ),
        ),
        (
            "--micro-batch-size 4 --global-batch-size 2",
            1,
            ("--global-batch-size 2", "--micro-batch-size 4", "multiple of 4"),
        ),
    ],
)
def test_parallel_sizes(arguments, world_size, parts):
    assert_one_problem(problem(arguments, world_size), parts)


@pytest.mark.parametrize(
    ("arguments", "world_size"),
    [
        ("--context-parallel-size 2", 2),
        # Four tokens a rank are two pieces, and one for each of four tensor-parallel ranks.
        ("--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel "
         "--seq-length 8", 8),
        # Neighbours may share a sequence: there is one copy of the model here.
        ("--context-parallel-size 2 --memory-layers 1 --memory-parallel-size 2", 2),
    ],
)  # fmt: skip
def test_context_parallel_sizes_that_work(arguments, world_size):
    check_config(parse(arguments), world_size)
