"""Tokenizers whose ids no model has rows for, and libraries that panic."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers

from megatron_memory.conversion.tokenizer_files import load_tokenizer
from megatron_memory.data.preprocess.blocks import LineBlock, Position
from megatron_memory.data.preprocess.encoding import DocumentEncoder, list_encoder
from megatron_memory.data.preprocess.tokenizer import load_text_tokenizer
from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.exceptions import CheckpointError, DataError
from megatron_memory.reading.panics import panics_as_errors
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.tokenizer_files import LARGEST_ID, check_tokenizer_files
from tests.bounded import within

TOKENIZER = Path(__file__).parents[1] / "golden" / "preprocess" / "tokenizer"
IDS: list[Any] = [2**60, LARGEST_ID, -1, 1.0, True, None, "1", "9" * 5000]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound tokenizer to damage."""
    return Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))


def _options(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(folder),
        vocab_size=None,
        tokenizer_hf_include_special_tokens=False,
    )


def _read_everywhere(folder: Path, expected: str) -> None:
    for error, read in (
        (DataError, lambda: build_tokenizer("HuggingFaceTokenizer", str(folder))),
        (DataError, lambda: load_text_tokenizer(_options(folder))),
        (CheckpointError, lambda: load_tokenizer(folder)),
    ):
        with pytest.raises(error) as caught:
            read()
        assert expected in str(caught.value)


def test_a_sound_tokenizer(folder: Path):
    check_tokenizer_files(folder)
    check_tokenizer_files(folder / "tokenizer.json")
    check_tokenizer_files("a/hub-name")


def test_an_id_of_2_to_the_60_is_refused_wherever_a_tokenizer_is_read(folder: Path):
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"]["sparse"] = 2**60
    path.write_text(json.dumps(definition))
    expected = f"{path}: the id of 'sparse' is {2**60}, and must be a whole number from 0"
    assert within(1 << 30, lambda: _read_everywhere(folder, expected)) < 256 << 20


@pytest.mark.parametrize("number", IDS, ids=lambda number: str(number)[:24])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("tokenizer.json", lambda content, number: content["model"]["vocab"].update(x=number)),
        (
            "tokenizer.json",
            lambda content, number: content["added_tokens"].append({"content": "x", "id": number}),
        ),
        ("added_tokens.json", lambda content, number: content.update(x=number)),
        ("vocab.json", lambda content, number: content.update(x=number)),
    ],
)
def test_ids_that_are_none(name: str, place: Any, number: Any, folder: Path):
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    place(content, number)
    path.write_text(json.dumps(content))
    with pytest.raises(UnsafeFile, match=f"{path}: the id of 'x' is .*Copy the tokenizer again"):
        check_tokenizer_files(folder)


@pytest.mark.parametrize("number", [str(2**60), "-1", "x", "9" * 5000, ""])
def test_ids_as_keys(number: str, folder: Path):
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"added_tokens_decoder": {number: {"content": "x"}}}
    path.write_text(json.dumps(content))
    with pytest.raises(UnsafeFile, match=f"{path}: the id of a dict is "):
        check_tokenizer_files(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"added_tokens": 1}'])
def test_files_that_are_no_tokenizer(text: str, folder: Path):
    (folder / "tokenizer.json").write_text(text)
    _read_everywhere(folder, f"{folder / 'tokenizer.json'}: ")


def test_a_panic_is_an_error():
    # A file of any kind at which the library in Rust panics will do.
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(UnsafeFile, match="library that reads it fails: why"),
        panics_as_errors(),
    ):
        raise panic("why")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
    with pytest.raises(Exception, match="expected value"), panics_as_errors():
        tokenizers.Tokenizer.from_str("x")


def test_a_panic_on_a_text_refuses_the_text(folder: Path):
    """A definition that loads, and panics when it encodes: a piece of no length."""
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    path.write_text(json.dumps(definition))
    for plain in (True, False):
        if not plain:  # A setting that transformers reads.
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings |= {"split_special_tokens": False}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = load_text_tokenizer(_options(folder))
        with pytest.raises(UnsafeFile, match="chunk size"):
            tokenizer.encode(["a text"])
        encoder = DocumentEncoder(
            keys=("text",),
            encode=list_encoder(tokenizer.encode),
            eod=None,
            vocab_size=tokenizer.vocab_size,
            dtype=np.dtype(np.int32),
        )
        text = b'{"text": "a text"}\n'
        block = LineBlock(first_record=1, num_bytes=len(text), end=Position(), lines=text)
        refused = encoder(block)
        assert [number for number, _ in refused.problems] == [1]
        assert "the tokenizer refuses the text (UnsafeFile: " in refused.problems[0][1]
    # megatron-core encodes a text as it loads.
    with pytest.raises(DataError, match="chunk size"):
        build_tokenizer("HuggingFaceTokenizer", str(folder))


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


EXPLODING = {
    "six steps": [_replace({"Regex": "."}, "x" * 32)] * 6,
    "each step what the next one names": [
        _replace({"String": chr(0x4E00 + i)}, chr(0x4E01 + i) * 10) for i in range(8)
    ],
    "nested": [{"type": "Sequence", "normalizers": [_replace({"String": "a"}, "a" * 50)] * 4}],
    "one long text": [_replace({"String": "a"}, "a" * 100_000)],
}


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("name", EXPLODING)
def test_replacements_that_multiply_a_text_are_refused(name: str, part: str, folder: Path):
    """Six steps would make a gigabyte of each character."""
    inner = "normalizers" if part == "normalizer" else "decoders"
    steps = json.loads(json.dumps(EXPLODING[name]).replace("normalizers", inner))
    _change(folder, **{part: {"type": "Sequence", inner: steps}})
    assert within(2**29, lambda: _refused(folder)) < 2**27


def _refused(folder: Path) -> None:
    with pytest.raises(UnsafeFile, match="tokenizer.json: .*replacement"):
        check_tokenizer_files(folder)


def test_many_replacements_of_single_characters_are_sound(folder: Path):
    """As SentencePiece's and multilingual models have them: no step names what another makes."""
    steps = [_replace({"String": chr(0x100 + i)}, chr(0x300 + i) * 3) for i in range(60)]
    steps += [_replace({"String": " "}, "\u2581"), _replace({"Regex": " {2,}"}, "\u2581")]
    _change(folder, normalizer={"type": "Sequence", "normalizers": steps})
    check_tokenizer_files(folder)


def _change(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | parts), "utf-8")


def test_a_tokenizer_that_draws_its_ids_is_refused(folder: Path):
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["dropout"] = 0.1
    path.write_text(json.dumps(definition))
    _read_everywhere(folder, "its model has dropout 0.1")
    definition["model"]["dropout"] = 0.0
    path.write_text(json.dumps(definition))
    check_tokenizer_files(folder)
