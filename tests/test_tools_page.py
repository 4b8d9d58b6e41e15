"""docs/tools.md: its way from a Hugging Face model to a memory model, by its very commands.

Only the sizes of the training differ, and the machine's.
"""

import gzip
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_memory.inference.generator import load_generator
from megatron_memory.inference.options import ModelSource, Sampling
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import shutdown_distributed
from tests.conversion import hf_program
from tests.inference.saved_models import logits_without_cache

REPOSITORY = Path(__file__).parents[1]
TOKENIZER = REPOSITORY / "examples" / "data" / "tokenizer"
PROMPT = "The capital of a country is"
NUM_TOKENS = 8
SMALLER = {
    "--workers": "2",
    "--seq-length": "64",
    "--micro-batch-size": "2",
    "--global-batch-size": "4",
    "--train-iters": "6",
    "--eval-iters": "1",
    "--lr-warmup-iters": "1",
    "--lr": "1e-2",
}


def commands() -> list[list[str]]:
    """Of the page's first section."""
    page = (REPOSITORY / "docs" / "tools.md").read_text("utf-8")
    block = page.split("## From a Hugging Face model")[1].split("```")[1]
    lines = block.strip().replace("\\\n", " ").splitlines()
    return [_smaller(shlex.split(line)) for line in lines]


def _smaller(words: list[str]) -> list[str]:
    for place, word in enumerate(words[:-1]):
        words[place + 1] = SMALLER.get(word, words[place + 1])
    return words


def _make_inputs(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    with gzip.open(REPOSITORY / "examples" / "data" / "wordnet.jsonl.gz", "rt") as source:
        (folder / "corpus.jsonl").write_text("".join(next(source) for _ in range(600)))


def _run(words: list[str], folder: Path) -> None:
    """As the page says, but tools in this process, which has imported what takes them seconds."""
    if words[0] == "python":
        tool = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        assert tool.main(words[2:]) == 0, words
        return
    paths = os.pathsep.join(str(path) for path in (REPOSITORY, REPOSITORY / "kernels"))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, f"{words}: {run.stderr[-3000:]}"


@pytest.fixture
def own_groups():
    """The generator makes Megatron's groups in this process, which other tests make anew."""
    yield
    shutdown_distributed()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.usefixtures("own_groups")
def test_the_pages_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _make_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands():
        _run(words, tmp_path)
    source = ModelSource(load=str(tmp_path / "run"), device="cpu")
    ours = load_generator(source, select_backend("cpu"))
    prompt = list(ours.tokenizer.tokenize(PROMPT))
    asked = {
        "folders": [str(tmp_path / "exported")],
        "tokens": [prompt],
        "prompt_tokens": len(prompt),
        "new_tokens": NUM_TOKENS,
        "text": PROMPT,
    }
    run = subprocess.run(
        [sys.executable, "-I", hf_program.__file__, json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (answer,) = json.loads(run.stdout.splitlines()[-1]).values()

    logits = torch.load(tmp_path / "exported" / "logits.pt", weights_only=True)[0]
    expected = logits_without_cache(ours.model, prompt, int(ours.tokenizer.vocab_size))
    # Rounding of fp32 over twelve layers.
    assert (logits - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    sampling = Sampling(num_tokens_to_generate=NUM_TOKENS, greedy=True)
    (completion,) = ours.generate([PROMPT], sampling)
    assert answer["cached"][0][len(prompt) :] == list(completion.tokens)
    assert answer["text"] == PROMPT + completion.text
