"""lm-eval's `--model hf` on an exported folder: it likes best what our own model likes best."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron_memory.conversion.hf import write_hf
from tests.conversion.memory_models import TOKENIZER, build_case
from tests.tiny import SEQUENCE, one_rank

__all__ = ["one_rank"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="needs lm-eval: python -m pip install -e '.[eval]'",
    ),
]
QUESTIONS = ("The currency of", "A dog is", "Red is a", "To run is", "An oak", "The river", "Ten")
CHOICES = (" Japan", " an animal", " a colour of light", " slow")


def test_its_answers_are_ours(one_rank, tmp_path: Path):
    model, state = build_case("memory+")
    folder = tmp_path / "model"
    folder.mkdir()
    write_hf(dataclasses.replace(state, tokenizer=TOKENIZER), folder)
    preferred = [_preferred(model, question) for question in QUESTIONS]
    assert len(set(preferred)) > 1, "a model that always chooses alike shows little"
    _write_task(tmp_path, preferred)
    results = _evaluate(folder, tmp_path)
    assert results["tiny_facts"]["acc,none"] == 1.0
    # Its generation ran; what it should say is not known.
    assert "exact_match,none" in results["tiny_texts"]


def _preferred(model, question: str) -> int:
    """The choice whose tokens our model finds likeliest behind the question."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    scores = []
    for choice in CHOICES:
        tokens = torch.tensor([tokenizer.encode(question + choice)])
        start = len(tokenizer.encode(question))
        assert tokens.shape[1] <= SEQUENCE
        with torch.inference_mode():
            positions = torch.arange(tokens.shape[1])[None]
            logits = model(tokens, positions, None).log_softmax(-1)
        chosen = logits[0, start - 1 : -1].gather(-1, tokens[0, start:, None])
        scores.append(chosen.sum().item())
    return max(range(len(scores)), key=scores.__getitem__)


def _write_task(folder: Path, preferred: list[int]) -> None:
    lines = [
        json.dumps({"question": question, "choices": CHOICES, "answer": answer})
        for question, answer in zip(QUESTIONS, preferred, strict=True)
    ]
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n")
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "facts.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    tasks = {
        "tiny_facts": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        },
        "tiny_texts": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, task in tasks.items():
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name} | common | task))


def _evaluate(model: Path, tasks: Path) -> dict:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True,max_length={SEQUENCE}"]
    command += ["--tasks", "tiny_facts,tiny_texts", "--include_path", str(tasks)]
    command += ["--batch_size", "4", "--output_path", str(tasks / "results")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(tasks / "home"),
        "HF_MODULES_CACHE": str(tasks / "modules"),
    }
    result = subprocess.run(
        command, cwd=tasks, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (report,) = (tasks / "results").rglob("results_*.json")
    return json.loads(report.read_text())["results"]
