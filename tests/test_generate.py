"""`python -m megatron_memory.generate`: what it prints, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_memory import generate
from megatron_memory.data.tokenizer_hash import TOKENIZER_HASH, hash_of
from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.inference import saved_model
from tests.distributed import run_ranks
from tests.inference.saved_models import save_model, tiny_config

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "tests" / "golden" / "preprocess" / "tokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with a tokenizer of text."""
    folder = tmp_path_factory.mktemp("saved")
    data = {
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(TOKENIZER),
        "vocab_size": 4096,
    }
    run_ranks(save_model, 1, tiny_config(folder, data=data), (5, 10))
    return folder


@pytest.fixture
def run(folder, capsys):
    """Calls the program in this process: its exit code, what it printed, its errors."""

    def call(*words):
        exit_code = generate.main(["--load", str(folder), "--device", "cpu", *words])
        printed = capsys.readouterr()
        return exit_code, printed.out, printed.err

    return call


def test_prompts_continuations_and_speed(run, folder):
    exit_code, out, err = run("--prompt", "A dog is", "Water", "--greedy", "--max-new-tokens", "6")
    assert exit_code == 0, err
    assert f"loaded {folder}/iter_0000010\n" in out
    assert "memory kernels: torch's operators on the CPU (--memory-kernels auto)\n" in out
    assert "\nprompt> A dog is\nA dog is" in out
    assert "\nprompt> Water\nWater" in out
    assert " tokens/s\n" in out


def test_a_seed_and_an_iteration_reproduce_the_output(run):
    words = ("--prompt", "A dog is", "--max-new-tokens", "6", "--iteration", "5", "--seed")
    outputs = [run(*words, seed)[1].split("\n\n")[1] for seed in ("3", "4", "3")]
    assert outputs[0] == outputs[2] != outputs[1]


def test_another_tokenizer_than_the_trainings(run, folder, monkeypatch):
    """Of the same size, by what the checkpoint says of the training's."""
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(TOKENIZER))
    words = ("--prompt", "A dog is", "--greedy", "--max-new-tokens", "2")
    read = saved_model.read_intact_common
    for hashed, code in ((hash_of(tokenizer), 0), ("0" * 64, 2)):
        monkeypatch.setattr(
            saved_model,
            "read_intact_common",
            lambda path, hashed=hashed: read(path) | {TOKENIZER_HASH: hashed},
        )
        exit_code, out, err = run(*words)
        assert exit_code == code and ("is not the one that" in err) == (code == 2)
        exit_code, out, _ = run(*words, "--tokenizer-model", str(TOKENIZER))
        assert exit_code == 0 and ("is not the one that" in out) == (code == 2)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", "a", "--max-new-tokens", "48"], "give --num-tokens-to-generate 47 at most"),
        (["--prompt", "word " * 48], "shorten it to at most 47 tokens"),
        (["--prompt", ""], "is empty"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0"),
        (["--prompt", "a", "--top-k", "2", "--top-p", "0.5"], "both restrict"),
        (["--prompt", "a", "--iteration", "6"], "--iteration 6: "),
        (["--prompt", "a", "--hidden-size", "6"], "--hidden-size is not a flag"),
        (["--prompt", "a", "--tokenizer-model", "nowhere/at/all"], "--tokenizer-model nowhere"),
        (["--prompt", "a", "--tensor-model-parallel-size", "2"], "the run has 1 processes"),
        (["--prompt", "a", "--memory-kernels", "cuda"], "--memory-kernels is 'cuda'"),
        (["--prompt", "a", "--memory-kernels", "triton"], "--memory-kernels triton: "),
        (["--prompt", "a", "--memory-fp8-values"], "this run computes in fp32"),
    ],
)
def test_errors_end_with_a_message_and_code_2(run, words, message, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    exit_code, _, err = run(*words)
    assert exit_code == 2
    assert message in err
    assert "Traceback" not in err


def test_an_absent_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert generate.main(["--load", "x", "--prompt", "a", "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no GPU" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_processes_print_what_one_does(run, folder):
    words = ["--prompt", "A dog is", "Water", "--greedy", "--max-new-tokens", "6"]
    _, alone, _ = run(*words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "megatron_memory.generate", "--load", str(folder), "--device", "cpu"]
    finished = subprocess.run(
        [*command, "--tensor-model-parallel-size", "2", *words],
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.rsplit("\n\n", 1)[0] == alone.rsplit("\n\n", 1)[0]
    assert "Warning" not in finished.stderr
