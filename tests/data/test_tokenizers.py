"""Tokenizers by name: what they give, and what is said about bad ones."""

import base64
import json
import shutil

import pytest
import sentencepiece

from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.tokenizer import load_text_tokenizer
from megatron_memory.data.tokenizers import (
    build_tokenizer,
    check_vocab_size,
    end_of_document,
    ids_without_token,
    num_ids,
    padded_vocab_size,
)
from megatron_memory.exceptions import ConfigurationError, DataError
from tests.data.helpers import GOLDEN

TEXT = "Naïve readers,\n\ttoo: 中文!"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("the cat sat on the mat; a quick brown fox jumps\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "small"),
        vocab_size=25,
        minloglevel=2,
    )
    return folder / "small.model"


def tiktoken_vocabulary(path, num_entries: int = 300):
    entries = [bytes([i]) for i in range(256)]
    entries += [b"a" * i for i in range(2, 2 + num_entries - 256)]
    rows = [
        {"rank": i, "token_bytes": base64.b64encode(e).decode(), "token_str": repr(e)}
        for i, e in enumerate(entries)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_hugging_face():
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(GOLDEN / "tokenizer"))
    assert (tokenizer.vocab_size, end_of_document(tokenizer)) == (4096, 0)
    assert tokenizer.detokenize(tokenizer.tokenize(TEXT)) == TEXT


def test_byte_level_is_plain_bytes():
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    assert tokenizer.tokenize(TEXT) == list(TEXT.encode())
    assert (tokenizer.vocab_size, tokenizer.bos, end_of_document(tokenizer)) == (258, 256, 257)
    assert tokenizer.detokenize([256, *TEXT.encode(), 257]) == TEXT
    assert tokenizer.pad is None


def test_null():
    tokenizer = build_tokenizer("NullTokenizer", vocab_size=100)
    assert tokenizer.tokenize("3 1 4") == [3, 1, 4]
    assert (tokenizer.vocab_size, end_of_document(tokenizer)) == (101, 100)


def test_sentencepiece(sentencepiece_model):
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model))
    assert (tokenizer.vocab_size, end_of_document(tokenizer)) == (25, 2)
    assert tokenizer.detokenize(tokenizer.tokenize("the cat sat")) == "the cat sat"


def test_tiktoken(tmp_path):
    path = tiktoken_vocabulary(tmp_path / "small.json", 300)
    with pytest.raises(DataError, match="cannot be read as TikTokenizer.*--vocab-size"):
        build_tokenizer("TikTokenizer", str(path))
    # megatron-core keeps 1000 ids for special tokens before the vocabulary.
    tokenizer = build_tokenizer("TikTokenizer", str(path), vocab_size=1300)
    assert tokenizer.vocab_size == 1300
    assert tokenizer.detokenize(tokenizer.tokenize("aaa bc")) == "aaa bc"
    assert end_of_document(tokenizer) == 2


@pytest.mark.parametrize(
    ("tokenizer_type", "model", "message"),
    [
        ("GPT2BPETokenizer", None, "--tokenizer-type GPT2BPETokenizer: unknown. Choose one of"),
        ("HuggingFaceTokenizer", None, "HuggingFaceTokenizer needs --tokenizer-model"),
        ("NullTokenizer", None, "NullTokenizer needs --vocab-size"),
    ],
)
def test_flags_that_do_not_fit(tokenizer_type, model, message):
    with pytest.raises(ConfigurationError, match=message):
        build_tokenizer(tokenizer_type, model)


@pytest.mark.parametrize(
    "tokenizer_type", ["HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer"]
)
def test_unreadable_files(tmp_path, tokenizer_type):
    absent = f"{tmp_path}/absent"
    with pytest.raises(
        DataError, match=f"--tokenizer-model {absent}: no such file or folder. Give"
    ):
        build_tokenizer(tokenizer_type, absent)
    (tmp_path / "tokenizer.json").write_text('{"model": "damaged')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model = tmp_path if tokenizer_type == "HuggingFaceTokenizer" else tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=f"{model}: cannot be read as {tokenizer_type}.*Give"):
        build_tokenizer(tokenizer_type, str(model))


def test_the_tokenizer_must_fit_the_vocabulary():
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(GOLDEN / "tokenizer"))
    assert check_vocab_size(tokenizer, None) == 4096
    assert check_vocab_size(tokenizer, 5000) == 5000
    message = "--vocab-size 4095: the tokenizer .* has ids up to 4095.*at least 4096"
    with pytest.raises(ConfigurationError, match=message):
        check_vocab_size(tokenizer, 4095)


def test_ids_with_holes_count_to_the_largest(tmp_path):
    """A run, preprocessing's type of ids and its check all go by the largest id, not the number."""
    shutil.copytree(GOLDEN / "tokenizer", tmp_path / "holes")
    path = tmp_path / "holes" / "tokenizer.json"
    definition = json.loads(path.read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 70000
    path.write_text(json.dumps(definition))
    folder = str(tmp_path / "holes")

    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder)
    assert tokenizer.vocab_size == 4096
    assert num_ids(tokenizer) == check_vocab_size(tokenizer, None) == 70001
    assert ids_without_token(tokenizer) == list(range(4095, 70000))
    with pytest.raises(ConfigurationError, match="ids up to 70000.*at least 70001"):
        check_vocab_size(tokenizer, 70000)
    options = PreprocessOptions(
        input=("-",),
        output_prefix="out",
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=folder,
    )
    assert load_text_tokenizer(options).vocab_size == 70001


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [((258, 128, 1), 384), ((256, 128, 2), 256), ((257, 128, 2), 512), ((1, 1, 3), 3)],
)
def test_padded_vocab_size(sizes, padded):
    assert padded_vocab_size(*sizes) == padded


@pytest.mark.parametrize(
    ("sizes", "flag"),
    [
        ((0, 1, 1), "--vocab-size 0"),
        ((1, 0, 1), "--make-vocab-size-divisible-by 0"),
        ((1, 1, -1), "--tensor-model-parallel-size -1"),
    ],
)
def test_padded_vocab_size_of_nothing(sizes, flag):
    with pytest.raises(ConfigurationError, match=f"{flag}: must be at least 1"):
        padded_vocab_size(*sizes)
