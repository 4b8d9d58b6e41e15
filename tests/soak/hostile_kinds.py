"""More kinds of file that are damaged: tokenizers, what preprocessing leaves, and the small files
of a checkpoint's folder. Each has a reader that says what a sound one gives, and holds what it
accepts to what the changed file itself says."""

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_memory.conversion.generation_settings import read_generation
from megatron_memory.data.indexed.manifest import read_manifest
from megatron_memory.data.preprocess import outputs, sources
from megatron_memory.data.preprocess.pipeline import preprocess
from megatron_memory.data.preprocess.tokenizer import TextTokenizer, load_text_tokenizer
from megatron_memory.data.tokenizer_hash import hash_of
from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.output import accept_any_text
from megatron_memory.reading.panics import without_panics
from megatron_memory.training.checkpoint import folders, lease
from megatron_memory.training.checkpoint.checksums import MARK, check_sums, read_sums, write_sums
from tests.conversion.tokenizers_of_many_kinds import EXAMPLE
from tests.data.preprocess.test_resume import DOCS, PAIR
from tests.data.test_tokenizers import tiktoken_vocabulary
from tools import dataset, preprocess_data

TEXTS = ["a b c", "The cat sat on 3 mats.", "naïve 中文\n\n\tx"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Named:
    """The flags that name a tokenizer."""

    tokenizer_type: str
    tokenizer_model: str
    vocab_size: int | None = None
    tokenizer_hf_include_special_tokens: bool = False


def small_tokenizer(folder: Path) -> None:
    """Byte-level BPE of few merges, in a folder that says all that there is to say."""
    folder.mkdir(exist_ok=True)
    definition = json.loads((EXAMPLE / "tokenizer.json").read_text())
    model = definition["model"]
    model["merges"] = model["merges"][:40]
    model["vocab"] = {text: i for text, i in model["vocab"].items() if i < 300}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    shutil.copy(EXAMPLE / "tokenizer_config.json", folder)


def sentencepiece_model(folder: Path) -> None:
    folder.mkdir()
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 10),
        model_writer=stream,
        vocab_size=40,
        hard_vocab_limit=False,
        # Else most of the file is a table of Unicode's forms.
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "small.model").write_bytes(stream.getvalue())


def _tiktoken(folder: Path) -> None:
    folder.mkdir()
    tiktoken_vocabulary(folder / "vocab.json", 280)


def _encoded(encode: Callable[[str], Any]) -> list[list[int]]:
    """Ids of the texts; -1 for one that it refuses, with what kind of error it likes."""
    found = []
    for text in TEXTS:
        try:
            found.append(list(encode(text)))
        except Exception:
            found.append([-1])
    return found


def _ids(tokenizer: TextTokenizer) -> list[list[int]]:
    found = _encoded(lambda text: tokenizer.encode([text])[0])
    assert all(number < tokenizer.vocab_size for ids in found for number in ids)
    return found


def _read_hugging_face(folder: Path) -> None:
    """By the two loaders, of preprocessing and of training, alike: the file said it."""
    named = _Named(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder))
    ours = load_text_tokenizer(named)
    theirs = build_tokenizer("HuggingFaceTokenizer", str(folder))
    assert ours.hash == hash_of(theirs)
    assert _ids(ours) == _encoded(without_panics(theirs.tokenize))


def _read_sentencepiece(folder: Path) -> None:
    path = folder / "small.model"
    named = _Named(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(path))
    ours = load_text_tokenizer(named)
    said = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    assert _ids(ours) == said.encode(TEXTS) and ours.vocab_size == said.get_piece_size()


def _read_tiktoken(folder: Path) -> None:
    path = folder / "vocab.json"
    named = _Named(tokenizer_type="TikTokenizer", tokenizer_model=str(path), vocab_size=1280)
    ours = load_text_tokenizer(named)
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in json.loads(path.read_text())]
    for text, ids in zip(TEXTS, _ids(ours), strict=True):
        assert b"".join(tokens[number - 1000] for number in ids).decode() == text


@contextlib.contextmanager
def _often():
    """Records after each of some small blocks, without waiting for a disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_BLOCK_BYTES", 500)
        patch.setattr(outputs, "_SECONDS_BETWEEN_RECORDS", 0.0)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _preprocess(folder: Path, *flags: str) -> None:
    with _often():
        preprocess(
            preprocess_data.parse_options(
                [
                    *("--input", str(folder / "docs.jsonl"), "--output-prefix"),
                    *(str(folder / "mlm"), "--tokenizer-type", "HuggingFaceTokenizer"),
                    *("--tokenizer-model", str(folder / "tokenizer"), "--append-eod"),
                    *("--no-gigatoken", *flags),
                ]
            )
        )


def _documents(folder: Path) -> None:
    folder.mkdir()
    small_tokenizer(folder / "tokenizer")
    lines = DOCS.read_bytes().splitlines(keepends=True)
    (folder / "docs.jsonl").write_bytes(b"".join(lines[:40]))


def _interrupted(folder: Path) -> None:
    _documents(folder)
    add, left = outputs.Outputs.add, [3]

    def add_some(self: outputs.Outputs, block: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, block)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(outputs.Outputs, "add", add_some)
        _preprocess(folder)


def _read_journal(folder: Path) -> dict[str, str]:
    """What the run that goes on gives in the end."""
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    try:
        _preprocess(folder, "--resume")
        return {
            suffix: hashlib.sha256((folder / f"{PAIR}.{suffix}").read_bytes()).hexdigest()
            for suffix in ("bin", "idx", "json")
        }
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)


def _published(folder: Path) -> None:
    _documents(folder)
    _preprocess(folder)


def _read_manifest(folder: Path) -> None:
    """By all that reads one."""
    accept_any_text()
    prefix = str(folder / PAIR)
    assert read_manifest(prefix) == json.loads((folder / f"{PAIR}.json").read_bytes())
    for argv in (
        ["inspect", prefix],
        ["split", prefix, "--documents", "7", "--outputs", f"{folder}/one", f"{folder}/two"],
        ["merge", "--input", prefix, f"{folder}/one", "--output-prefix", str(folder / "both")],
        ["verify", prefix, str(folder / "both"), str(folder / "one")],
    ):
        command = dataset._parser().parse_args(argv)
        with _often():
            command.command(command)


def _summed(folder: Path) -> None:
    folder.mkdir()
    for number in range(3):
        (folder / f"file_{number}").write_bytes(bytes([number]) * 99)
    write_sums(folder, "xxh3_128")


def _read_sums(folder: Path) -> str:
    check_sums(folder, {MARK: True})
    return repr(read_sums(folder, {MARK: True}))


def _tracked(folder: Path) -> None:
    (folder / "iter_0000012").mkdir(parents=True)
    folders.write_tracker(folder, 12)


def _read_tracker(folder: Path) -> None:
    assert folders.read_tracker(folder) == int((folder / folders.TRACKER).read_bytes())


def _held(folder: Path) -> None:
    folder.mkdir()
    dead = dataclasses.replace(lease._this_process(), run="dead", pid=2**22 + 5)
    (folder / lease.LEASE_FILE).write_text(json.dumps(dataclasses.asdict(dead)))


def _read_lease(folder: Path) -> None:
    """Whatever a dead run's file says, the next run takes the folder."""
    there = folder / "there"
    there.mkdir()
    shutil.copy(folder / lease.LEASE_FILE, there)
    os.utime(there / lease.LEASE_FILE, (0, 0))
    try:
        held = lease.Lease(there)
        held.require()
        held.release()
    finally:
        shutil.rmtree(there)


def _generation(folder: Path) -> None:
    folder.mkdir()
    settings = {"eos_token_id": [1, 2], "temperature": 0.7, "do_sample": True, "top_k": 50}
    (folder / "generation_config.json").write_text(json.dumps(settings))


def _read_generation(folder: Path) -> None:
    found = read_generation(folder, {})
    assert found.in_file == json.loads((folder / "generation_config.json").read_bytes())


CASES: dict[str, tuple[Callable, Callable, str, int | None, int]] = {
    "tokenizer": (small_tokenizer, _read_hugging_face, "tokenizer.json", None, 300),
    "tokenizer-config": (
        small_tokenizer,
        _read_hugging_face,
        "tokenizer_config.json",
        None,
        200,
    ),
    "sentencepiece": (sentencepiece_model, _read_sentencepiece, "small.model", None, 500),
    "tiktoken": (_tiktoken, _read_tiktoken, "vocab.json", None, 300),
    "journal": (_interrupted, _read_journal, f"{PAIR}.journal", None, 300),
    "manifest": (_published, _read_manifest, f"{PAIR}.json", None, 500),
    "sums": (_summed, _read_sums, "integrity.json", None, 1000),
    "tracker": (_tracked, _read_tracker, folders.TRACKER, None, 500),
    "lease": (_held, _read_lease, lease.LEASE_FILE, None, 300),
    "generation": (_generation, _read_generation, "generation_config.json", None, 500),
}
"""As those of test_hostile_files.py."""
