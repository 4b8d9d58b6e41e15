"""The tokenizer of an exported folder gives the tokens of the training's, or is not there."""

import dataclasses
import json
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_memory.config import DataConfig
from megatron_memory.conversion.hf_tokenizer import write_tokenizer
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import CheckpointError
from tests.conversion.memory_models import TOKENIZER
from tests.tiny import tiny_config

KINDS = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "like-llama2": {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
    },
}
TEXT = "the memory of a model holds facts: currencies, capitals, rivers and 1234567890 names"


def _state(tokenizer: Path | None, kind: str | None = None) -> SavedState:
    config = dataclasses.replace(tiny_config("pkm"), data=DataConfig(tokenizer_type=kind))
    return SavedState(config=config, vocab_size=300, weights={}, tokenizer=tokenizer)


def _train(folder: Path, **options) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT[i % 40 :] for i in range(100)]),
        model_prefix=str(folder / "spm"),
        vocab_size=295,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return folder / "spm.model"


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", KINDS)
def test_sentencepiece_gives_the_same_tokens_in_transformers(kind, model_type, tmp_path):
    file = _train(tmp_path, **KINDS[kind])
    folder = tmp_path / "out"
    folder.mkdir()
    written = write_tokenizer(_state(file), folder, model_type)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert written.is_there and written.note is None
    original = sentencepiece.SentencePieceProcessor(model_file=str(file))
    exported = AutoTokenizer.from_pretrained(folder)
    assert written.special_tokens == {"bos_token_id": 1, "eos_token_id": 2}
    assert (exported.bos_token_id, exported.eos_token_id) == (1, 2)
    for text in ("the memory  of rivers", " 12 ☃\nnames ", "capitals, Ünïcode ½"):
        tokens = original.encode(text)
        assert exported.encode(text, add_special_tokens=False) == tokens
        assert exported.decode(tokens) == original.decode(tokens)


def test_a_kind_that_transformers_would_tokenize_otherwise_is_not_written(tmp_path):
    file = _train(tmp_path, model_type="bpe", treat_whitespace_as_suffix=True)
    folder = tmp_path / "out"
    folder.mkdir()
    written = write_tokenizer(_state(file), folder, "llama")
    assert not written.is_there and "otherwise" in written.note
    assert not list(folder.iterdir())


def test_others_are_named(tmp_path):
    as_bytes = write_tokenizer(_state(None, "ByteLevelTokenizer"), tmp_path, "llama")
    assert as_bytes.special_tokens == {"bos_token_id": 256, "eos_token_id": 257}
    assert "bytes" in as_bytes.note
    assert "--tokenizer-model" in write_tokenizer(_state(None), tmp_path, "llama").note
    vocabulary = tmp_path / "tiktoken.json"
    vocabulary.write_text("[]")
    assert (
        "tiktoken.json"
        in write_tokenizer(_state(vocabulary, "TikTokenizer"), tmp_path, "llama").note
    )
    copied = write_tokenizer(_state(TOKENIZER, "HuggingFaceTokenizer"), tmp_path, "llama")
    assert copied.is_there and copied.special_tokens == {"bos_token_id": 0, "eos_token_id": 0}
    assert set(AutoTokenizer.from_pretrained(tmp_path)("a b")) == {"input_ids", "attention_mask"}
    # By itself, for transformers 4 has another default.
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    original = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    assert original.items() <= settings.items()


def test_a_damaged_one_is_refused(tmp_path):
    (tmp_path / "spm.model").write_bytes(b"\x00\xff" * 40)
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        write_tokenizer(_state(tmp_path / "spm.model"), tmp_path, "llama")
