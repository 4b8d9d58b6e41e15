"""SentencePiece's and tiktoken's vocabularies, before a library reads them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.exceptions import DataError
from tests.bounded import within
from tests.data.test_tokenizers import tiktoken_vocabulary


@pytest.mark.parametrize("tokenizer_type", ["SentencePieceTokenizer", "TikTokenizer"])
def test_pipes_devices_and_folders_are_not_read(tmp_path: Path, tokenizer_type: str):
    os.mkfifo(tmp_path / "pipe.json")
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match=f"{path}: cannot be read as {tokenizer_type}"):
            build_tokenizer(tokenizer_type, str(path))


@pytest.mark.parametrize("vocab_size", [10**9, 10**30, 1000, -1])
def test_a_vocabulary_size_that_the_file_has_not(tmp_path: Path, vocab_size: int):
    path = str(tiktoken_vocabulary(tmp_path / "vocab.json", 280))

    def build() -> None:
        with pytest.raises(DataError, match="--vocab-size .*above the 1000 .* at most 1280"):
            build_tokenizer("TikTokenizer", path, vocab_size=vocab_size)

    assert within(1 << 30, build) < 64 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 7}, "entry 270 has the rank 7"),
        ({"rank": 270.0}, "entry 270 has the rank 270.0"),
        ({"token_bytes": "YW!Fh"}, "token_bytes of entry 270 is no base 64: 'YW!Fh'"),
        ({"token_bytes": None}, "token_bytes of entry 270 is no base 64: None"),
        ({"token_bytes": ""}, "entry 270 is empty"),
        ({"token_bytes": "YQ=="}, "entries 97 and 270 are the same token"),
        ({"more": 1}, "entry 270 does not have just rank, token_bytes, token_str"),
    ],
)
def test_an_entry_that_is_none(tmp_path: Path, change: dict[str, Any], message: str):
    path = tiktoken_vocabulary(tmp_path / "vocab.json", 280)
    entries = json.loads(path.read_text())
    entries[270] |= change
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=f"vocab.json: {message}"):
        build_tokenizer("TikTokenizer", str(path), vocab_size=1280)
