"""gigatoken gives the tokenizer's ids, or is not used."""

import dataclasses
import random

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_memory.data.preprocess import fast_bpe
from megatron_memory.data.preprocess.fast_bpe import FastEncoder, TokenMismatch
from tests.data.helpers import GOLDEN
from tests.data.preprocess.test_tokenizer import load


@pytest.fixture(scope="module")
def tokenizer():
    return load(GOLDEN / "tokenizer")


def assert_same(encoder, tokenizer, texts):
    ids, lengths = encoder(texts)
    expected = tokenizer.encode(texts)
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == [number for of_text in expected for number in of_text]


TEXTS = {
    "none": [],
    "empty": ["", "", ""],
    "special text": ["a<|endoftext|>b", "<|endoftext|>", "<|endoftext|> <|endoftext|"],
    "control characters": ["x\x00y", "\x00", "\u2028\u2029\x85\xa0", "\ufeffabc", "\r\n\t"],
    "one very long, among short": ["a", "word " * 40_000, "", "b c"],
    "no spaces": ["a" * 200_000, "中文" * 50_000, " " * 100_000],
    "all lengths": ["x y" * length for length in range(300)],
}


@pytest.mark.parametrize("name", TEXTS)
def test_same_ids(tokenizer, name):
    assert_same(FastEncoder(tokenizer, []), tokenizer, TEXTS[name])


def test_same_ids_of_random_characters(tokenizer):
    generator = random.Random(0)
    encoder = FastEncoder(tokenizer, [])
    common = "abc ABC'1 2\n\t<|>éñ中\U0001f600\u0301\xa0\u3000_-.,!"
    texts = ["".join(generator.choices(common, k=generator.randrange(30))) for _ in range(2000)]
    for _ in range(2000):
        codes = (generator.randrange(0x110000) for _ in range(6))
        texts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    assert_same(encoder, tokenizer, texts)


def test_a_long_document_does_not_widen_the_others(tokenizer):
    texts = ["short text"] * 1000 + ["word " * 20_000] + ["short text"] * 1000
    groups = list(fast_bpe._groups([text.encode() for text in texts]))
    assert sum(map(len, groups)) == 2001
    assert max(len(group) * max(map(len, group)) for group in groups) < 20 * sum(map(len, texts))


def another(tokenizer, change):
    """The tokenizer, its own ids changed where gigatoken's are not."""
    return dataclasses.replace(
        tokenizer, encode=lambda texts: [change(ids) for ids in tokenizer.encode(texts)]
    )


def test_a_probe_that_differs(tokenizer):
    other = another(tokenizer, lambda ids: [i + (i == 221) for i in ids])
    with pytest.raises(TokenMismatch, match="gigatoken gives .*221.* where .*222.* for the text"):
        FastEncoder(other, [])


def test_a_text_of_the_input_that_differs(tokenizer):
    rare = tokenizer.encode(["a physical entity"])[0][1]
    other = another(tokenizer, lambda ids: [i for i in ids if i != rare])
    FastEncoder(other, ["a text"])
    with pytest.raises(TokenMismatch, match="for the text 'a physical entity'"):
        FastEncoder(other, ["a text", "a physical entity"])


def test_one_text_in_a_thousand_is_compared(tokenizer):
    compared = []
    counting = dataclasses.replace(
        tokenizer, encode=lambda texts: compared.extend(texts) or tokenizer.encode(texts)
    )
    encoder = FastEncoder(counting, [])
    compared.clear()
    for _ in range(40):
        encoder(["one text of fifty characters, more or less, or so"] * 100)
    share = sum(map(len, compared)) / (40 * 100 * 50)
    assert 0.0005 < share < 0.0015
    wrong = another(tokenizer, lambda ids: ids[::-1])
    encoder._reference = wrong.encode
    with pytest.raises(TokenMismatch):
        for _ in range(40):
            encoder(["one text of fifty characters, more or less, or so"] * 100)


def test_a_model_that_gigatoken_does_not_know(tokenizer):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = dataclasses.replace(tokenizer, definition=words.to_str())
    with pytest.raises(TokenMismatch, match="not known to honour a model WordLevel"):
        FastEncoder(other, [])


def test_refused_text_is_for_the_caller(tokenizer):
    encoder = FastEncoder(tokenizer, ["\ud800"])
    with pytest.raises(UnicodeEncodeError):
        encoder(["good", "\ud800"])
    ids, lengths = encoder(["good"])
    assert ids.dtype == np.uint32 and lengths.sum() == ids.size
