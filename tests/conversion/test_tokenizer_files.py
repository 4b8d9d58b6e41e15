"""A copied tokenizer gives the original's ids, as transformers builds it where the copy lies."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoTokenizer

from megatron_memory.conversion.hf import read_hf, write_hf
from megatron_memory.conversion.hf_families import FAMILIES
from megatron_memory.conversion.hf_memory import MODEL_TYPE, register
from megatron_memory.conversion.tokenizer_check import TEXTS, check_same_tokenizer
from megatron_memory.conversion.tokenizer_files import AS_TRAINED, copy_tokenizer, tokenizer_files
from megatron_memory.conversion.verify_files import check_files
from megatron_memory.exceptions import CheckpointError
from tests.conversion.states import save_hf_model
from tests.conversion.tokenizers_of_many_kinds import KINDS


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, make in KINDS.items():
        made[name] = tmp_path_factory.mktemp("tokenizers") / name
        make(made[name])
    return made


def _copy(original: Path, folder: Path, model_type: str | None) -> Path:
    register()
    copy_tokenizer(original, folder, model_type)
    if model_type is not None:
        values = CONFIG_MAPPING[model_type]().to_dict()
        (folder / "config.json").write_text(json.dumps(values, default=str))
    return folder


def _ids(folder: Path, **options) -> list:
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]


@pytest.mark.parametrize("model_type", [None, MODEL_TYPE, *FAMILIES])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_original(kind, model_type, originals, tmp_path):
    folder = _copy(originals[kind], tmp_path / "copy", model_type)
    assert _ids(folder) == _ids(originals[kind])
    assert check_same_tokenizer(originals[kind], folder, None)
    # Nor does the user's trust change them.
    if (folder / AS_TRAINED).is_file():
        assert _ids(folder, trust_remote_code=True) == _ids(originals[kind])


def test_transformers_would_have_made_others_of_plain_copies(originals, tmp_path):
    """What the comparison is there for: it sees what a copy of the files would do."""
    shutil.copytree(originals["digits-in-threes"], tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text('{"model_type": "qwen2"}')
    assert _ids(tmp_path / "copy") != _ids(originals["digits-in-threes"])
    with pytest.raises(CheckpointError, match="normalizer, pre_tokenizer differ"):
        check_same_tokenizer(originals["digits-in-threes"], tmp_path / "copy", None)


def test_what_reads_alike_everywhere_is_copied_as_it_is(originals, tmp_path):
    for kind, model_type in (("digits-in-threes", "llama"), ("like-qwen2", "qwen2")):
        folder = tmp_path / kind
        copy_tokenizer(originals[kind], folder, model_type)
        for file in tokenizer_files(originals[kind]):
            assert (folder / file.name).read_bytes() == file.read_bytes()


def test_settings_that_versions_read_differently_are_said_plainly(originals, tmp_path):
    copy_tokenizer(originals["added-tokens"], tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == ["<|tool|>"]
    assert "extra_special_tokens" not in settings
    other = tmp_path / "prefix"
    copy_tokenizer(originals["prefix-space"], other)
    assert json.loads((other / "tokenizer_config.json").read_text())["add_prefix_space"] is True


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("tokenizer.json", ('"EUR"', '"USD"'), "added_tokens differ"),
        ("tokenizer.json", ('"single_word": true', '"single_word": false'), "added_tokens differ"),
        ("tokenizer_config.json", ('"<|endoftext|>"', '"EUR"'), "differ"),
    ],
)
def test_a_copy_that_differs_is_named(file, change, reason, originals, tmp_path):
    folder = _copy(originals["added-tokens"], tmp_path / "copy", "llama")
    text = (folder / file).read_text()
    assert change[0] in text
    (folder / file).write_text(text.replace(*change))
    with pytest.raises(CheckpointError, match=reason):
        check_same_tokenizer(originals["added-tokens"], folder, None)


def test_an_exported_model_has_the_tokenizer_that_it_was_trained_with(originals, tmp_path):
    """The type of model that a dense one with --add-qkv-bias becomes, and its verification."""
    save_hf_model("qwen2", tmp_path / "in")
    tokenizer = originals["digits-in-threes"]
    state = dataclasses.replace(read_hf(tmp_path / "in"), tokenizer=tokenizer)
    folder = tmp_path / "out"
    folder.mkdir()
    write_hf(state, folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
    assert _ids(folder) == _ids(tokenizer)
    (line, _) = check_files(state, "hf", folder)
    assert "texts in many scripts, and special tokens" in line
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["auto_map"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="pre_tokenizer differ"):
        list(check_files(state, "hf", folder))


@pytest.mark.parametrize("kind", ["digits-in-threes", "added-tokens"])
def test_chat_templates_beside_the_first_are_copied(kind, originals, tmp_path):
    """With the files as they are, and with the definition written anew."""
    original = tmp_path / "in"
    shutil.copytree(originals[kind], original)
    (original / "chat_template.jinja").write_text("one")
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates" / "tool_use.jinja").write_text("two")
    folder = _copy(original, tmp_path / "copy", "llama")
    assert check_same_tokenizer(original, folder, None)
    copied = AutoTokenizer.from_pretrained(folder)
    assert copied.chat_template == {"default": "one", "tool_use": "two"}
    shutil.rmtree(folder / "additional_chat_templates")
    with pytest.raises(CheckpointError, match="its chat_template differ"):
        check_same_tokenizer(original, folder, None)
    (tmp_path / "secret").write_text("three")
    (original / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link to .*secret"):
        copy_tokenizer(original, tmp_path / "again", "llama")
