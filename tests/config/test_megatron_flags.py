"""Flags of Megatron-LM that this program has not: each is answered with a reason."""

import re

import pytest

from megatron_memory.config import load_config, parse_arguments
from megatron_memory.config.flags import all_spellings
from megatron_memory.config.megatron_flags import (
    _ACCEPTED,
    _refused,
    why_accepted,
    why_refused,
)
from megatron_memory.exceptions import ConfigurationError
from tests.config.helpers import base_arguments


def fails(*arguments: str) -> str:
    with pytest.raises(ConfigurationError) as error:
        parse_arguments([*base_arguments(), *arguments])
    return str(error.value)


def test_no_flag_of_ours_is_refused_or_ignored():
    _, families = _refused()
    for name in all_spellings():
        assert why_refused(name) is None, name
        assert why_accepted(name, []) is None, name
        assert not any(name.startswith(prefix) for prefix in families), name


def test_entries_are_written_as_keys_and_give_a_reason():
    exact, families = _refused()
    reasons = {**exact, **families, **{name: entry.why for name, entry in _ACCEPTED.items()}}
    assert len(reasons) > 500
    for name, reason in reasons.items():
        assert re.fullmatch("[a-z0-9_]+", name), name
        assert len(reason) > 15 and not reason.endswith("."), name


def test_no_name_is_in_a_family_and_by_itself():
    exact, families = _refused()
    twice = [name for name in [*exact, *_ACCEPTED] if name.startswith(tuple(families))]
    assert twice == []


def test_no_flag_is_both_refused_and_accepted():
    assert sorted(set(_refused()[0]) & set(_ACCEPTED)) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--fp16"], "training runs in fp32 or bf16; use --bf16"),
        (["--fp8-format", "hybrid"], "use --bf16"),
        (["--mock-data"], "tools/preprocess_data.py"),
        (["--use-flash-attn"], "use --transformer-impl transformer_engine"),
        (["--standalone-embedding-stage"], "--pipeline-model-parallel-layout"),
        (["--cp-comm-type", "p2p"], "context parallelism passes keys round a ring"),
        (["--rampup-batch-size", "8", "8", "100"], "the batch size is constant"),
        (["--wandb-project", "x"], "give --tensorboard-dir"),
        (["--use-legacy-models"], "megatron-core"),
        (["--train-samples", "100"], "--train-iters"),
        (["--vocab-file", "v.json", "--merge-file", "m.txt"], "--tokenizer-model"),
        (["--squared-relu"], "use --swiglu"),
        (["--retro-add-retriever"], "the model is a GPT"),
        (["--vision-pretraining"], "language models on text only"),
        (["--DDP-impl", "torch"], "only the value local works here"),
        (["--dataloader-type", "cyclic"], "only the value single works here"),
        (["--use-checkpoint-args"], "a checkpoint that does not fit is refused"),
    ],
)
def test_reasons(arguments, reason):
    message = fails(*arguments)
    assert f"{arguments[0]} is known to Megatron-LM, but not supported: " in message
    assert reason in message


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ckpt-format", "torch"], "--ckpt-format torch is not supported here: "),
        (["--optimizer", "muon"], "--optimizer muon is not supported here: "),
        (["--position-embedding-type", "yarn"], "--position-embedding-type yarn is not supported"),
        (["--transformer-impl", "inference_optimized"], "use transformer_engine"),
        (["--moe-token-dispatcher-type", "flex"], "use alltoall"),
    ],
)
def test_values_that_are_known_but_not_supported(arguments, reason):
    assert reason in fails(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--use-mcore-models"],
        ["--no-masked-softmax-fusion"],
        ["--attention-backend", "auto"],
        ["--dataloader-type", "single"],
        ["--exit-signal-handler"],
        ["--local-rank=0"],
        ["--DDP-impl", "local"],
    ],
)
def test_what_has_no_effect_is_said(arguments):
    notes: list[str] = []
    parse_arguments([*base_arguments(), *arguments], notify=notes.append)
    name = arguments[0].split("=")[0]
    assert len(notes) == 1
    assert notes[0].startswith(f"{name} has no effect here: ")


def test_only_the_first_rank_says_it(monkeypatch, capsys):
    for rank, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        parse_arguments([*base_arguments(), "--use-mcore-models"])
        assert len(capsys.readouterr().err.splitlines()) == num_lines


def test_files_are_answered_alike(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("fp16: true\nattention_backend: flash\n", "utf-8")
    with pytest.raises(ConfigurationError) as error:
        load_config(path)
    assert f"fp16 in {path} is known to Megatron-LM" in str(error.value)
    assert f"attention_backend in {path} is known to Megatron-LM" in str(error.value)


def test_a_misspelt_flag_of_ours_is_not_taken_for_megatrons():
    assert "Did you mean --moe-router-topk?" in fails("--moe-router-tok", "2")
    assert "Did you mean --recompute-modules?" in fails("--recompute-module", "mlp")


def test_a_launch_script_of_megatron_carries_over():
    script = """
        --num-layers 12 --hidden-size 512 --num-attention-heads 8 --seq-length 1024
        --max-position-embeddings 1024 --group-query-attention --num-query-groups 2
        --position-embedding-type rope --rotary-base 500000 --rotary-percent 1.0
        --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
        --untie-embeddings-and-output-weights --attention-dropout 0.0 --hidden-dropout 0.0
        --init-method-std 0.0134 --no-masked-softmax-fusion --attention-softmax-in-fp32
        --accumulate-allreduce-grads-in-fp32 --micro-batch-size 1 --global-batch-size 32
        --train-iters 500 --lr 0.00015 --min-lr 1.0e-5 --lr-decay-style cosine
        --lr-warmup-fraction .01 --lr-decay-iters 430 --weight-decay 0.1 --adam-beta1 0.9
        --adam-beta2 0.95 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 2
        --pipeline-model-parallel-size 1 --sequence-parallel --use-distributed-optimizer
        --overlap-grad-reduce --overlap-param-gather --transformer-impl local
        --data-path corpus_text_document --split 949,50,1 --tokenizer-type HuggingFaceTokenizer
        --tokenizer-model tokenizer --log-interval 100 --save-interval 1000 --eval-interval 1000
        --eval-iters 10 --save ckpt --load ckpt --tensorboard-dir logs --ckpt-format torch_dist
        --distributed-timeout-minutes 60 --num-workers 1 --use-mcore-models --log-throughput
    """
    notes: list[str] = []
    config = parse_arguments(script.split(), notify=notes.append)
    assert config.model.num_query_groups == 2
    assert config.optimizer.warmup_iters == pytest.approx(4.3)
    assert [note.split()[0] for note in notes] == [
        "--no-masked-softmax-fusion",
        "--use-mcore-models",
        "--log-throughput",
    ]
