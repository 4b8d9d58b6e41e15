"""Manifests: what they say, and what training says about another tokenizer."""

import json

import pytest

from megatron_memory.data.datasets import build_datasets
from megatron_memory.data.indexed.manifest import manifest_path, read_manifest
from megatron_memory.data.tokenizer_hash import hash_of
from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.exceptions import DataError
from tests.data.helpers import GOLDEN, null_tokenizer
from tests.data.preprocess.test_resume import DOCS, PAIR, assert_complete, run


@pytest.fixture
def pair(tmp_path):
    assert run(tmp_path) == 0
    return str(tmp_path / PAIR)


def summary(prefix, tokenizer):
    return build_datasets(
        tokenizer=tokenizer,
        padded_vocab_size=4096,
        seq_length=16,
        num_train_samples=8,
        num_valid_samples=0,
        num_test_samples=0,
        seed=1,
        data_path=[prefix],
        split="100,0,0",
    ).summary


def test_what_a_manifest_says(tmp_path, pair):
    manifest = assert_complete(tmp_path)
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(GOLDEN / "tokenizer"))
    assert manifest["tokenizer"] == {
        "type": "HuggingFaceTokenizer",
        "model": str(GOLDEN / "tokenizer"),
        "vocab_size": 4096,
        "eod": 0,
        "hash": hash_of(tokenizer),
    }
    assert (manifest["documents"], manifest["sequences"]) == (305, 304)
    assert (manifest["tokens"], manifest["dtype"]) == (25582 // 2, "uint16")
    assert (manifest["json_key"], manifest["append_eod"]) == ("text", True)
    assert manifest["sources"] == [
        {
            "path": str(DOCS),
            "bytes": 55957,
            "text_bytes": 55957,
            "lines": 305,
            "crc32": "05b2ea1e",
        }
    ]


def test_training_with_the_same_tokenizer_says_nothing(pair):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(GOLDEN / "tokenizer"))
    assert not any("warning" in line for line in summary(pair, tokenizer))


def test_training_with_another_tokenizer_warns(pair):
    (warning,) = (w for w in summary(pair, build_tokenizer("ByteLevelTokenizer")) if "warning" in w)
    assert f"{pair} was made with another tokenizer (HuggingFaceTokenizer" in warning
    assert not any("warning" in line for line in summary(pair, null_tokenizer()))


def test_a_damaged_manifest_does_not_stop_training(pair):
    with open(manifest_path(pair), "w") as stream:
        stream.write('{"tokenizer": ')
    with pytest.raises(DataError, match="the manifest cannot be read"):
        read_manifest(pair)
    assert "cannot be read" in summary(pair, build_tokenizer("ByteLevelTokenizer"))[-1]


@pytest.mark.parametrize("content", [{}, {"tokenizer": {}}, {"anything": [1]}])
def test_other_programs_files_of_that_name(pair, content):
    with open(manifest_path(pair), "w") as stream:
        json.dump(content, stream)
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    assert not any("warning" in line for line in summary(pair, tokenizer))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokenizer": [1]}, "tokenizer is a list, and must be an object of type, model"),
        ({"tokenizer": {"vocab_size": "many"}}, "tokenizer is a dict, and must be an object"),
        ({"tokens": -1}, "tokens is -1, and must be a whole number, 0 or more"),
        ({"skipped_lines": None}, "skipped_lines is None"),
        ({"sources": [1]}, "sources is a list, and must be a list of objects"),
        ({"format": 2}, "format is 2, and must be 1"),
    ],
)
def test_values_of_another_kind_are_refused(pair, content, message):
    with open(manifest_path(pair), "w") as stream:
        json.dump(content, stream)
    with pytest.raises(DataError, match=f"{pair}.json: not a manifest: {message}"):
        read_manifest(pair)
