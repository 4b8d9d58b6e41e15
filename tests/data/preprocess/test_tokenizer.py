"""Tokenizers loaded without megatron-core are those that megatron-core loads."""

import json
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, processors

from megatron_memory.data.preprocess import tokenizer as loading
from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.tokenizer_hash import PROBE_TEXTS, hash_of
from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.exceptions import ConfigurationError
from tests.data.helpers import GOLDEN


def load(folder, **options) -> loading.TextTokenizer:
    return loading.load_text_tokenizer(
        PreprocessOptions(
            input=("-",),
            output_prefix="out",
            tokenizer_model=str(folder),
            **{"tokenizer_type": "HuggingFaceTokenizer", **options},
        )
    )


def folder_with(tmp_path, *, config=None, tokens=()):
    """The golden tokenizer with another configuration, and with tokens added."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(GOLDEN / "tokenizer", folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(config or {})}))
    definition = Tokenizer.from_file(str(folder / "tokenizer.json"))
    definition.add_tokens(list(tokens))
    definition.save(str(folder / "tokenizer.json"))
    return folder


FOLDERS = {
    "plain": {},
    "a token of no rank": {"tokens": ["hello"]},
    "an end that is no special token yet": {"config": {"eos_token": "<end>"}},
    "an end that is a common word": {"config": {"eos_token": "the"}},
    "no end but a separator": {"config": {"eos_token": None, "sep_token": "<|endoftext|>"}},
    "a prefix space": {"config": {"add_prefix_space": True}},
    "more special tokens": {"config": {"extra_special_tokens": ["<a>", "<b>"]}},
    "a class of its own": {"config": {"tokenizer_class": "GPT2Tokenizer"}},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_same_as_megatron_core(tmp_path, name):
    folder = folder_with(tmp_path, **FOLDERS[name])
    expected = build_tokenizer("HuggingFaceTokenizer", str(folder))
    found = load(folder)
    texts = [*PROBE_TEXTS, "hello <end> the cat<a> <b>"]
    assert found.encode(texts) == [list(expected.tokenize(text)) for text in texts]
    assert (found.vocab_size, found.eod) == (expected.vocab_size, expected.eod)
    assert found.hash == hash_of(expected)


def test_special_tokens_around_a_text(tmp_path):
    folder = folder_with(tmp_path)
    definition = Tokenizer.from_file(str(folder / "tokenizer.json"))
    definition.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    definition.save(str(folder / "tokenizer.json"))
    expected = build_tokenizer("HuggingFaceTokenizer", str(folder), include_special_tokens=True)
    found = load(folder, tokenizer_hf_include_special_tokens=True)
    texts = list(PROBE_TEXTS)
    assert found.encode(texts) == [list(expected.tokenize(text)) for text in texts]
    assert found.encode(["a"])[0][0] == 0
    assert found.definition is None, "gigatoken would leave the special tokens out"
    assert found.hash == load(folder).hash
    with pytest.raises(ConfigurationError, match=r"special-tokens: .* ByteLevelTokenizer, which"):
        load(
            folder,
            tokenizer_type="ByteLevelTokenizer",
            tokenizer_hf_include_special_tokens=True,
        )


def test_a_plain_folder_needs_no_large_library():
    script = (
        "import sys\n"
        "from tools.preprocess_data import main\n"
        "from megatron_memory.data.preprocess.options import PreprocessOptions\n"
        "from megatron_memory.data.preprocess.tokenizer import load_text_tokenizer\n"
        "load_text_tokenizer(PreprocessOptions(input=('-',), output_prefix='out', tokenizer_model="
        f"    {str(GOLDEN / 'tokenizer')!r}, tokenizer_type='HuggingFaceTokenizer'))\n"
        "print(*{'torch', 'megatron.core', 'transformers', 'awkward'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == [], done.stderr
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", ["vocabulary", "end", "merges"])
def test_the_hash_tells_tokenizers_apart(tmp_path, change):
    if change == "end":
        folder = folder_with(tmp_path, config={"eos_token": "the"})
    elif change == "vocabulary":
        folder = folder_with(tmp_path, tokens=["hello"])
    else:
        folder = folder_with(tmp_path)
        path = folder / "tokenizer.json"
        definition = json.loads(path.read_text())
        definition["model"]["merges"] = definition["model"]["merges"][::-1]
        path.write_text(json.dumps(definition))
    assert load(folder).hash != load(GOLDEN / "tokenizer").hash


def test_the_hash_does_not_depend_on_where_files_are(tmp_path):
    assert load(folder_with(tmp_path)).hash == load(GOLDEN / "tokenizer").hash
