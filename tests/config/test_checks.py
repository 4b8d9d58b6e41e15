"""Every check over the configuration: its message names the flags, the values and the fix."""

import dataclasses

import pytest

from megatron_memory.config import check_config, check_layers_available, parse_arguments
from megatron_memory.exceptions import ConfigurationError
from tests.config.helpers import parse


def problem(arguments: str, world_size: int = 1, without: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigurationError) as error:
        check_config(parse(arguments, without), world_size)
    return str(error.value)


def assert_one_problem(message: str, parts: tuple[str, ...]) -> None:
    assert "problems:" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "world_size"),
    [
        ("", 1),
        ("", 8),
        ("--tensor-model-parallel-size 2 --sequence-parallel", 4),
        ("--tensor-model-parallel-size 4 --num-query-groups 2", 4),
        ("--memory-layers 0,3 --memory-variant peer --tensor-model-parallel-size 4", 4),
        ("--memory-layers centered:2:2 --memory-value-dim 48 --memory-top-k 4", 2),
        ("--num-experts 4 --expert-model-parallel-size 2", 4),
        ("--num-experts 4 --tensor-model-parallel-size 2 --sequence-parallel", 2),
        ("--recompute-granularity full --recompute-method uniform --recompute-num-layers 4", 1),
        ("--recompute-activations --recompute-modules core_attn mlp", 1),
        ("--recompute-activations --recompute-modules memory --memory-layers 1", 1),
        (
            "--recompute-activations --recompute-modules memory --memory-layers 1 "
            "--memory-variant pkm --memory-value-dim 128",
            1,
        ),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 90 --lr-warmup-iters 10", 1),
        (
            "--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1",
            1,
        ),
        ("--optimizer sgd --overlap-grad-reduce", 2),
        ("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 2),
        ("--save a --save-interval 5 --keep-last 2 --async-save --load a --finetune", 1),
        ("--split 90,5,5", 1),
    ],
)
def test_what_works_passes(arguments, world_size):
    check_config(parse(arguments), world_size)


def test_a_dry_run_needs_no_data():
    check_config(parse("--dry-run", without=["--data-path"]), 1)
    check_config(parse("--train-data-path a --valid-data-path b", without=["--data-path"]), 1)
    check_config(parse("--vocab-size 100", without=["--tokenizer-type"]), 1)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            "--hidden-size 66",
            ("--hidden-size 66", "--num-attention-heads 4", "--kv-channels"),
        ),
        (
            "--num-query-groups 3",
            ("--num-attention-heads 4", "--num-query-groups 3", "divisor of the heads"),
        ),
        (
            "--position-embedding-type rope --kv-channels 15",
            ("--kv-channels 15", "--rotary-percent 1.0", "Make it even"),
        ),
        (
            "--position-embedding-type rope --rotary-percent 0.2",
            ("--kv-channels 16", "--rotary-percent 0.2", "Make it even"),
        ),
        (
            "--max-position-embeddings 31",
            ("--seq-length 32", "--max-position-embeddings 31", "at least 32"),
        ),
        (
            "--num-experts 2 --moe-router-topk 3",
            ("--moe-router-topk 3", "--num-experts 2", "Lower it"),
        ),
        (
            "--expert-model-parallel-size 1 --num-experts 1",
            ("--moe-router-topk 2", "--num-experts 1"),
        ),
    ],
)
def test_model(arguments, parts):
    assert_one_problem(problem(arguments), parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            "--expert-model-parallel-size 2",
            ("--expert-model-parallel-size 2", "give --num-experts"),
        ),
        (
            "--num-experts 3 --expert-model-parallel-size 2",
            ("--num-experts 3", "--expert-model-parallel-size 2", "divisor of the experts"),
        ),
        (
            "--num-experts 4 --tensor-model-parallel-size 2",
            ("--num-experts 4", "--tensor-model-parallel-size 2", "only with --sequence-parallel"),
        ),
    ],
)
def test_experts(arguments, parts):
    assert_one_problem(problem(arguments, world_size=4), parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            "--recompute-granularity full",
            ("--recompute-granularity full", "--recompute-method uniform"),
        ),
        (
            "--recompute-granularity full --recompute-method block --recompute-num-layers 5",
            ("--recompute-num-layers 5", "--num-layers 4", "lower it"),
        ),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
            ("--recompute-num-layers 3", "the model has 4", "choose a divisor"),
        ),
        ("--recompute-num-layers 1", ("--recompute-num-layers", "not given")),
        (
            "--recompute-method block --recompute-activations",
            ("--recompute-method", "it is selective"),
        ),
        ("--recompute-modules mlp", ("--recompute-modules mlp", "not given")),
        (
            "--recompute-activations --recompute-modules mlp moe",
            ("--recompute-modules moe", "--num-experts"),
        ),
        (
            "--recompute-activations --recompute-modules moe_act --num-experts 2",
            ("--recompute-modules moe_act", "--moe-grouped-gemm"),
        ),
        (
            "--recompute-activations --recompute-modules mlp memory",
            ("--recompute-modules memory", "needs --memory-layers"),
        ),
        (
            "--recompute-activations --recompute-modules memory --memory-layers 1 "
            "--memory-variant peer",
            ("--recompute-modules memory", "--memory-variant peer", "Leave memory away"),
        ),
        (
            "--recompute-activations --recompute-modules memory --memory-layers 1 "
            "--memory-variant pkm",
            ("--recompute-modules memory", "--memory-value-dim 64", "Leave memory away"),
        ),
    ],
)
def test_recompute(arguments, parts):
    assert_one_problem(problem(arguments), parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--min-lr 0.1", ("--min-lr 0.1", "--lr 0.001", "lower it")),
        (
            "--lr-warmup-fraction 0.1 --lr-warmup-iters 5",
            ("--lr-warmup-fraction 0.1", "--lr-warmup-iters 5", "give one"),
        ),
        (
            "--lr-warmup-iters 100",
            ("--lr-warmup-iters 100", "--lr-decay-iters 100", "fewer iterations"),
        ),
        ("--lr-warmup-init 0.01", ("--lr-warmup-init 0.01", "--lr 0.001", "lower it")),
        (
            "--memory-layers 1 --lr 1 --lr-warmup-init 0.01",
            ("--lr-warmup-init 0.01", "--memory-value-lr 0.001", "lower it"),
        ),
        ("--lr-decay-style WSD", ("--lr-decay-style WSD", "--lr-wsd-decay-iters")),
        (
            "--lr-wsd-decay-iters 5",
            ("--lr-wsd-decay-iters 5", "--lr-decay-style WSD", "it is linear"),
        ),
        (
            "--lr-decay-style WSD --lr-warmup-iters 20 --lr-wsd-decay-iters 90",
            ("--lr-wsd-decay-iters 90", "the 80 iterations", "--lr-decay-iters 100"),
        ),
    ],
)
def test_schedule(arguments, parts):
    assert_one_problem(problem(arguments), parts)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            "--weight-decay-incr-style linear --start-weight-decay 0.2 --end-weight-decay 0.1",
            ("--start-weight-decay 0.2", "--end-weight-decay 0.1", "lower it"),
        ),
        (
            "--end-weight-decay 0.1",
            ("--start-weight-decay 0.01", "--end-weight-decay 0.1", "linear or cosine"),
        ),
        (
            "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
            ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"),
        ),
        (
            "--optimizer sgd --use-distributed-optimizer",
            ("--optimizer sgd", "--use-distributed-optimizer", "leave one"),
        ),
    ],
)
def test_optimizer(arguments, parts):
    assert_one_problem(problem(arguments), parts)


@pytest.mark.parametrize(
    ("flag", "missing"),
    [
        ("--save-interval 5", "--save"),
        ("--keep-last 2", "--save"),
        ("--async-save", "--save"),
        ("--no-save-optim", "--save"),
        ("--no-save-rng", "--save"),
        ("--finetune", "--load"),
        ("--exit-on-missing-checkpoint", "--load"),
        ("--no-load-optim", "--load"),
        ("--no-load-rng", "--load"),
    ],
)
def test_checkpoints(flag, missing):
    assert_one_problem(problem(flag), (f"{flag} has no effect without {missing}: give",))


@pytest.mark.parametrize(
    ("arguments", "without", "parts"),
    [
        ("", ("--tokenizer-type",), ("--tokenizer-type", "--tokenizer-model FOLDER")),
        ("", ("--data-path",), ("--data-path is missing", "tools/preprocess_data.py")),
        (
            "--valid-data-path b",
            (),
            ("--data-path corpus_text_document", "--valid-data-path b", "choose one way"),
        ),
        (
            "--test-data-path b",
            ("--data-path",),
            ("--test-data-path b", "needs --train-data-path"),
        ),
        (
            "--train-data-path a --split 9,1",
            ("--data-path",),
            ("--split 9,1", "--data-path", "leave"),
        ),
        (
            "--reset-position-ids --position-embedding-type rope",
            (),
            ("--reset-position-ids", "no effect", "rope", "--reset-attention-mask"),
        ),
        (
            "--rotary-base 500",
            (),
            ("--rotary-base 500 has no effect", "learned_absolute", "rope, or omit --rotary-base"),
        ),
        (
            "--position-embedding-type rope --rope-scaling-factor 4",
            (),
            ("--rope-scaling-factor 4.0 has no effect", "--use-rope-scaling"),
        ),
        ("--split many", (), ("--split 'many'", "three numbers", "969, 30, 1")),
        ("--split 1,2,3,4", (), ("--split '1,2,3,4'", "three numbers")),
        ("--split 0,0,0", (), ("--split '0,0,0'", "three numbers")),
        ("--split 2,-1", (), ("--split '2,-1'", "three numbers")),
        ("--split nan,1", (), ("--split 'nan,1'", "three numbers")),
        ("--split 1e999,1", (), ("--split '1e999,1'", "three numbers")),
    ],
)
def test_data(arguments, without, parts):
    assert_one_problem(problem(arguments, without=without), parts)


def test_bounds_hold_for_configurations_made_without_flags():
    config = parse()
    broken = dataclasses.replace(
        config, training=dataclasses.replace(config.training, micro_batch_size=0)
    )
    with pytest.raises(ConfigurationError, match="--micro-batch-size is 0: it must be at least 1"):
        check_config(broken, 1)


def test_everything_wrong_is_said_at_once():
    message = problem("--memory-layers 9 --memory-top-k 2000 --min-lr 1")
    assert "has 3 problems" in message
    for flag in ("--memory-layers 9", "--memory-top-k 2000", "--min-lr 1.0"):
        assert flag in message


@pytest.mark.parametrize(
    ("arguments", "is_cuda", "has_transformer_engine"),
    [
        ("", False, False),
        ("--transformer-impl local", True, False),
        ("--transformer-impl transformer_engine --moe-grouped-gemm", True, True),
        ("--context-parallel-size 2 --bf16", True, True),
    ],
)
def test_layers_that_the_machine_has_pass(arguments, is_cuda, has_transformer_engine):
    check_layers_available(
        parse(arguments), is_cuda=is_cuda, has_transformer_engine=has_transformer_engine
    )


@pytest.mark.parametrize(
    ("arguments", "is_cuda", "has_transformer_engine", "parts"),
    [
        (
            "--transformer-impl transformer_engine",
            True,
            False,
            ("--transformer-impl transformer_engine", "not installed", "pip install"),
        ),
        (
            "--transformer-impl transformer_engine",
            False,
            True,
            ("--transformer-impl transformer_engine", "on the CPU", "--transformer-impl local"),
        ),
        (
            "--moe-grouped-gemm --num-experts 2",
            False,
            True,
            ("--moe-grouped-gemm", "on the CPU", "omit it"),
        ),
        (
            "--moe-grouped-gemm --num-experts 2",
            True,
            False,
            ("--moe-grouped-gemm", "not installed", "omit it", "pip install"),
        ),
        (
            "--context-parallel-size 2",
            True,
            False,
            ("--context-parallel-size 2", "not installed", "use 1", "pip install"),
        ),
        (
            "--context-parallel-size 2",
            True,
            True,
            ("--context-parallel-size 2", "fp32", "--bf16"),
        ),
        (
            "--context-parallel-size 2 --transformer-impl transformer_engine",
            False,
            True,
            ("--context-parallel-size 2", "on the CPU", "use 1"),
        ),
        (
            "--no-overlap-p2p-communication",
            False,
            False,
            ("--no-overlap-p2p-communication", "on the CPU", "omit it"),
        ),
    ],
)
def test_layers_that_the_machine_lacks(arguments, is_cuda, has_transformer_engine, parts):
    with pytest.raises(ConfigurationError) as error:
        check_layers_available(
            parse(arguments), is_cuda=is_cuda, has_transformer_engine=has_transformer_engine
        )
    assert_one_problem(str(error.value), parts)


@pytest.mark.parametrize(
    ("flag", "most"), [("--num-layers", 1024), ("--num-experts", 4096), ("--seed", 2**32 - 1)]
)
@pytest.mark.parametrize("value", [200_000_000_000, 2**60])
def test_sizes_that_planning_would_list_one_by_one(flag: str, most: int, value: int):
    with pytest.raises(ConfigurationError, match=f"{flag} is {value}: .* at most {most}"):
        parse_arguments([flag, str(value)])


def test_whole_numbers_are_those_of_files():
    with pytest.raises(ConfigurationError, match=f"--hidden-size is {2**63}: it must be below"):
        parse_arguments(["--hidden-size", str(2**63)])
