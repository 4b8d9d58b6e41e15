"""Verification compares what the written settings say, entry by entry: logits of some tokens depend
on few of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_memory.conversion.convert import convert, read_checkpoint
from megatron_memory.conversion.hf import write_hf
from megatron_memory.conversion.lingua_params import not_in_lingua
from megatron_memory.conversion.options import Target
from megatron_memory.conversion.verify_files import check_files
from megatron_memory.conversion.verify_settings import check_settings_back
from megatron_memory.exceptions import CheckpointError
from tests.conversion.memory_models import TOKENIZER, build_case
from tests.conversion.states import conversion, save_hf_model
from tests.tiny import one_rank  # noqa: F401

CONFIG = {"hf": "config.json", "lingua": "params.json", "megatron": "config.yaml"}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A model with its tokenizer, `in`, and the same in each format."""
    root = tmp_path_factory.mktemp("written")
    save_hf_model("mistral", root / "in")
    for file in TOKENIZER.glob("*.json"):
        shutil.copy(file, root / "in")
    said: list[str] = []
    for target in CONFIG:
        convert(conversion("hf", root / "in", target, root / target, verify=None), said.append)
    assert sum("settings of the model" in line for line in said) == 3
    # The reference's folder alone has no place for them.
    assert sum("left out" in line for line in said) == 2
    return root


def _change(path: Path, change: tuple[str, str]) -> None:
    text = path.read_text()
    assert text.count(change[0]) == 1
    path.write_text(text.replace(*change))


@pytest.mark.parametrize(
    ("target", "change", "named"),
    [
        ("hf", ('"rope_theta": 10000.0', '"rope_theta": 10001.0'), "theta 10001.0, not 10000"),
        ("hf", ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-07'), "rms_norm_eps 1e-07, not 1e-06"),
        ("hf", ('"max_position_embeddings": 50', '"max_position_embeddings": 60'), "60, not 50"),
        ("hf", ('_embeddings": false', '_embeddings": true'), "tie_word_embeddings True, not"),
        (
            "hf",
            ('"torch_dtype": "float32"', '"torch_dtype": "float16"'),
            "'float16', not",
        ),
        ("hf", ('"use_cache": true', '"use_cache": true, "sliding_window": 9'), "sliding_window 9"),
        ("lingua", ('"rope_theta": 10000.0', '"rope_theta": 10001.0'), "model.rope_theta 10001.0"),
        ("lingua", ('"max_seqlen": 50', '"max_seqlen": 60'), "model.max_seqlen 60, not 50"),
        (
            "lingua",
            ('"is_enabled": false', '"is_enabled": true'),
            "args.is_enabled True",
        ),
        ("megatron", ("rotary_base: 10000", "rotary_base: 10001"), "rotary_base 10001, not 10000"),
        ("megatron", ("norm_epsilon: 1.0e-06", "norm_epsilon: 1.0e-05"), "norm_epsilon 1e-05, not"),
        ("megatron", ("tokenizer_model: /", "tokenizer_model: /x/"), "tokenizer_model '/x/"),
    ],
)
def test_a_setting_that_changed_is_named(target, change, named, written, tmp_path):
    state = read_checkpoint("hf", written / "in")
    as_asked = Target(target_format=target, save=str(written / target))
    folder = tmp_path / "out"
    shutil.copytree(written / target, folder)
    assert check_settings_back(state, as_asked, folder, torch.float32) > 20
    path = next(p for p in folder.rglob(CONFIG[target]) if target != "megatron" or "iter" in str(p))
    _change(path, change)
    with pytest.raises(CheckpointError, match=f"--verify: .*{CONFIG[target]}") as raised:
        check_settings_back(state, as_asked, folder, torch.float32)
    assert named in str(raised.value)


def test_a_model_that_the_writer_itself_changed_is_named(written, tmp_path, monkeypatch):
    """A mistake of the writer is in what it would write again, too: a reader finds it."""
    module = "megatron_memory.conversion.hf.values_of"
    from megatron_memory.conversion.hf import values_of

    monkeypatch.setattr(module, lambda *args: values_of(*args) | {"rms_norm_eps": 1e-5})
    state = read_checkpoint("hf", written / "in")
    write_hf(state, tmp_path)
    with pytest.raises(CheckpointError, match="--norm-epsilon 1e-05, not 1e-06"):
        check_settings_back(
            state, Target(target_format="hf", save=str(tmp_path)), tmp_path, torch.float32
        )


@pytest.mark.parametrize("target", ["hf", "megatron"])
def test_a_tokenizer_that_is_not_there_is_told(target, written, tmp_path):
    state = read_checkpoint("hf", written / "in")
    shutil.copytree(written / target, tmp_path / "out")
    for file in list((tmp_path / "out").rglob("tokenizer*.json")):
        file.unlink()
    with pytest.raises(CheckpointError, match="lacks a copy of .*in"):
        list(check_files(state, target, tmp_path / "out"))


def test_what_the_reference_has_no_place_for_is_told(written):
    state = read_checkpoint("hf", written / "in")
    memory = dataclasses.replace(state.config.memory, layers="1", value_dropout=0.2)
    config = dataclasses.replace(state.config, memory=memory)
    told = list(not_in_lingua(dataclasses.replace(state, config=config)))
    assert told[0].endswith("/in") and "stop tokens" in told[1]
    assert told[2:] == ["--memory-value-dropout 0.2, which is of trainings"]


@pytest.mark.usefixtures("one_rank")
def test_the_memory_and_its_code_are_compared(tmp_path):
    _, state = build_case("memory+-with-all")
    write_hf(state, tmp_path)
    as_asked = Target(target_format="hf", save=str(tmp_path))
    assert check_settings_back(state, as_asked, tmp_path, torch.float32) > 40
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"memory_top_k": 3}))
    with pytest.raises(CheckpointError, match="memory_top_k 3, not 4"):
        check_settings_back(state, as_asked, tmp_path, torch.float32)
    (tmp_path / "modeling_memory_llama.py").write_text("")
    with pytest.raises(CheckpointError, match="modeling_memory_llama.py is missing, or not"):
        check_settings_back(state, as_asked, tmp_path, torch.float32)
