"""Every kind of tokenizer gives the files that Megatron-LM's tool writes of its own tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from megatron_memory.data.tokenizers import build_tokenizer
from tests.data.preprocess.test_resume import DOCS
from tests.data.test_tokenizers import tiktoken_vocabulary
from tools import preprocess_data

TEXTS = [json.loads(line)["text"] for line in DOCS.read_bytes().splitlines()[:120]]
SPECIAL = ["<unk>", "<s>", "</s>"]


def hugging_face(folder: Path, tokenizer: Tokenizer, **config) -> dict:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}


def llama(folder: Path) -> dict:
    """Llama 2's kind: BPE with byte fallback and a space before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.ByteFallback()
    config = {"unk_token": "<unk>", "bos_token": "<s>"}
    return hugging_face(folder, tokenizer, tokenizer_class="LlamaTokenizerFast", **config)


def word_piece(folder: Path) -> dict:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return hugging_face(folder, tokenizer, unk_token="<unk>")


def qwen(folder: Path) -> dict:
    """Qwen 2's kind: byte-level BPE with its own split, and tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("entity", normalized=False)])
    return hugging_face(folder, tokenizer)


def _regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def sentence_piece(folder: Path) -> dict:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "small"),
        vocab_size=400,
        character_coverage=0.98,
        minloglevel=2,
    )
    return {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_model": str(folder / "small.model"),
    }


def tiktoken(folder: Path) -> dict:
    folder.mkdir()
    path = tiktoken_vocabulary(folder / "vocab.json")
    return {"tokenizer_type": "TikTokenizer", "tokenizer_model": str(path), "vocab_size": 1300}


KINDS = {
    "Llama": (llama, True),
    "Qwen": (qwen, True),
    "WordPiece": (word_piece, False),
    "SentencePiece": (sentence_piece, None),
    "tiktoken": (tiktoken, None),
    "bytes": (lambda folder: {"tokenizer_type": "ByteLevelTokenizer"}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_files(tmp_path, capsys, kind):
    make, by_gigatoken = KINDS[kind]
    named = make(tmp_path / "tokenizer")
    assert_same_files(tmp_path, named, TEXTS)
    errors = capsys.readouterr().err
    if by_gigatoken is not None:
        assert ("without gigatoken" not in errors) == by_gigatoken, errors


def test_plain_numbers(tmp_path, capsys):
    named = {"tokenizer_type": "NullTokenizer", "vocab_size": 100}
    assert_same_files(tmp_path, named, ["1 2 3", "99", "0 100"])
    assert run(tmp_path, named, ["1 2", "3 101"]) == 1
    message = capsys.readouterr().err
    assert "line 2: the tokenizer refuses the text (ValueError: the tokenizer gives ids" in message


def run(folder: Path, named: dict, texts: list[str]) -> int:
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    argv = ["--input", str(source), "--output-prefix", str(folder / "ours"), "--append-eod"]
    for name, value in named.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return preprocess_data.main([*argv, "--workers", "2"])


def assert_same_files(folder: Path, named: dict, texts: list[str]) -> None:
    assert run(folder, named, texts) == 0
    tokenizer = build_tokenizer(
        named["tokenizer_type"], named.get("tokenizer_model"), vocab_size=named.get("vocab_size")
    )
    # The loop of Megatron-LM's tool.
    builder = IndexedDatasetBuilder(
        f"{folder / 'theirs'}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    for text in texts:
        ids = list(tokenizer.tokenize(text))
        ids += [tokenizer.eod] * bool(ids)
        builder.add_document(np.array(ids, dtype=builder.dtype), [len(ids)] if ids else [])
    builder.finalize(f"{folder / 'theirs'}.idx")
    for suffix in ("bin", "idx"):
        ours, theirs = (folder / f"{n}.{suffix}" for n in ("ours_text_document", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes(), suffix
