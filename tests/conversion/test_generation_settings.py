"""Stop tokens, sampling and a vocabulary that its tokenizer exceeds: through a conversion, through
a training, and back."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_memory.conversion import convert as convert_module
from megatron_memory.conversion.convert import convert
from megatron_memory.conversion.generation_settings import check_same_generation, read_generation
from megatron_memory.conversion.hf import read_config, read_hf, write_hf
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.generation import GenerationSettings
from tests.conversion.states import conversion
from tests.conversion.tokenizers_of_many_kinds import EXAMPLE
from tests.data.helpers import write_dataset

REPOSITORY = Path(__file__).parents[2]
SETTINGS = {
    "bos_token_id": 0,
    "eos_token_id": [0, 5],
    "pad_token_id": 7,
    "do_sample": True,
    "temperature": 0.6,
    "suppress_tokens": [3],
}
VOCAB = 4090
"""Six fewer than the tokenizer has ids."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "model"
    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": [0, 5], "pad_token_id": 7}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes, **heads, **tokens)).save_pretrained(
        folder
    )
    for file in EXAMPLE.iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return folder


def _train(load: Path, save: Path, data: str) -> None:
    """One step with the configuration that the conversion wrote."""
    words = f"--config {load}/config.yaml --load {load} --finetune --save {save} --data-path {data}"
    words += " --split 1 --seq-length 16 --micro-batch-size 1 --global-batch-size 1"
    words += " --train-iters 1 --eval-iters 0 --lr 1e-3"
    subprocess.run(
        [sys.executable, "-m", "megatron_memory.train", *words.split()],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
    )


def test_through_a_training_and_back(model, tmp_path):
    """The checkpoint that the training writes has the settings, and rows for all ids."""
    told: list[str] = []
    convert(conversion("hf", model, "megatron", tmp_path / "in", verify=True), told.append)
    assert any("ids up to 4095, and the model rows for 4090" in line for line in told)
    assert any("verified: the tokenizer" in line for line in told)
    assert any("verified: the generation settings" in line for line in told)
    untrained = tmp_path / "untrained"
    convert(conversion("megatron", tmp_path / "in", "hf", untrained, verify=True), told.append)
    assert any("generation settings" in line for line in told)
    original, back = (load_file(f / "model.safetensors") for f in (model, untrained))
    assert original.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in original.items())

    data = write_dataset(tmp_path / "data", [[4090, 4095, 1, 2, 3, 0]] * 20)
    _train(tmp_path / "in", tmp_path / "run", data)
    convert(conversion("megatron", tmp_path / "run", "hf", tmp_path / "out"), told.append)
    for folder, rows in ((untrained, VOCAB), (tmp_path / "out", 4096)):
        assert json.loads((folder / "generation_config.json").read_text()) == SETTINGS
        config = read_config(folder)
        assert (config["eos_token_id"], config["pad_token_id"]) == ([0, 5], 7)
        assert config["vocab_size"] == rows
        text = "In 1984 the club had 12,500 members."
        ids = [AutoTokenizer.from_pretrained(f)(text).input_ids for f in (folder, model)]
        assert ids[0] == ids[1]
    _check_that_a_changed_tokenizer_is_noticed(tmp_path)
    trained = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    # The ids of the data that the model had no rows for are trained, one between them is not.
    assert trained[4090].abs().max() > 0 and trained[4092].abs().max() == 0


def _check_that_a_changed_tokenizer_is_noticed(folder: Path) -> None:
    """The training wrote down what its tokenizer did."""
    definition = folder / "in" / "tokenizer" / "tokenizer.json"
    kept = definition.read_text()
    values = json.loads(kept)
    values["normalizer"] = {"type": "Lowercase"}
    definition.write_text(json.dumps(values))
    told: list[str] = []
    with pytest.raises(CheckpointError, match="not the tokenizer that the model was trained with"):
        convert(conversion("megatron", folder / "run", "hf", folder / "other"), told.append)
    named = str(definition.parent)
    convert(
        conversion("megatron", folder / "run", "hf", folder / "other", tokenizer_model=named),
        told.append,
    )
    assert any("is not the tokenizer that" in line for line in told)
    definition.write_text(kept)


@pytest.mark.parametrize(("verify", "is_compared"), [(None, True), (False, False)])
def test_files_of_a_large_model_are_compared_all_the_same(
    verify, is_compared, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(convert_module, "_VERIFIED_BY_ITSELF", 0)
    told: list[str] = []
    convert(conversion("hf", model, "hf", tmp_path / "out", verify=verify), told.append)
    assert any("verified: the tokenizer" in line for line in told) == is_compared
    assert any("verified: 9 generation settings" in line for line in told) == is_compared
    assert not any("bit for bit" in line for line in told)


def test_without_the_file_none_is_made(model, tmp_path):
    """transformers then goes by config.json, before and after."""
    shutil.copytree(model, tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").unlink()
    (tmp_path / "out").mkdir()
    write_hf(read_hf(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()
    assert read_config(tmp_path / "out")["eos_token_id"] == [0, 5]


def test_the_tokenizers_tokens_where_nothing_is_known(model, tmp_path):
    state = dataclasses.replace(read_hf(model), generation=None)
    write_hf(state, tmp_path)
    expected = {"bos_token_id": 0, "eos_token_id": 0}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected


@pytest.mark.parametrize(
    ("file", "change", "name"),
    [
        ("generation_config.json", {"eos_token_id": 0}, "eos_token_id"),
        ("generation_config.json", {"top_k": 5}, "top_k"),
        ("config.json", {"pad_token_id": None}, "pad_token_id"),
    ],
)
def test_a_setting_that_was_lost_is_named(file, change, name, model, tmp_path):
    settings = read_generation(model, read_config(model))
    write_hf(read_hf(model), tmp_path)
    assert check_same_generation(settings, tmp_path, read_config(tmp_path)) == 9
    values = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=f"{file} differs .* in {name}"):
        check_same_generation(settings, tmp_path, read_config(tmp_path))


@pytest.mark.parametrize(
    ("ids", "stop"), [(3, (3,)), ([3, 4], (3, 4)), (None, ()), ("a", ()), ([True, -1, 2], (2,))]
)
def test_stop_tokens(ids, stop):
    assert GenerationSettings(in_config={"eos_token_id": ids}).stop_tokens() == stop


def test_damaged_settings_of_a_checkpoint_are_refused():
    with pytest.raises(CheckpointError, match="generation settings are damaged"):
        GenerationSettings.of_common({"generation": [1]}, "here")
