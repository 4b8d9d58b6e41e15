"""tools/preprocess_data.py: the bytes of Megatron-LM's tool, and what happens to bad input."""

import gzip
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_memory.data.preprocess import encoding, pipeline, sources
from megatron_memory.data.preprocess.workers import WorkerError
from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/preprocess"
TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer"]
TOKENIZER += ["--tokenizer-model", str(GOLDEN / "tokenizer")]


def run_on(path: Path, prefix: Path, *flags: str) -> int:
    return preprocess_data.main(
        ["--input", str(path), "--output-prefix", str(prefix), *TOKENIZER, *flags]
    )


def assert_golden(folder: Path, *names: str) -> None:
    expected = {f"{name}.{suffix}" for name in names for suffix in ("bin", "idx", "json")}
    assert {path.name for path in folder.iterdir()} == expected, "other files are left"
    for name in filter(lambda name: not name.endswith(".json"), expected):
        assert (folder / name).read_bytes() == (GOLDEN / name).read_bytes(), name


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("block_bytes", [300, 512 * 1024])
def test_same_bytes_as_megatron_lm(tmp_path, monkeypatch, workers, block_bytes):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block_bytes)
    docs = GOLDEN / "docs.jsonl"
    assert run_on(docs, tmp_path / "mlm", "--append-eod", "--workers", workers) == 0
    keys = ["--json-keys", "text", "title"]
    assert run_on(docs, tmp_path / "mlm_noeod", *keys, "--workers", workers) == 0
    assert_golden(
        tmp_path, "mlm_text_document", "mlm_noeod_text_document", "mlm_noeod_title_document"
    )


@pytest.mark.parametrize("workers", ["1", "3"])
def test_compressed_input_in_several_files(tmp_path, workers):
    lines = (GOLDEN / "docs.jsonl").read_bytes().splitlines(keepends=True)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:100])))
    (parts / "b.jsonl").write_bytes(b"".join(lines[100:200]))
    # Without a line end after the last line.
    (parts / "c.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[200:]).rstrip(b"\n")))
    out = tmp_path / "out"
    flags = ["--append-eod", "--workers", workers]
    assert run_on(parts / "*", out / "mlm", *flags) == 0
    assert_golden(out, "mlm_text_document")


def test_as_a_script_with_progress(tmp_path):
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(GOLDEN / "docs.jsonl")]
    command += ["--output-prefix", str(tmp_path / "mlm"), *TOKENIZER, "--append-eod"]
    command += ["--workers", "2", "--log-interval", "100"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_golden(tmp_path, "mlm_text_document")
    progress, *_, last = done.stderr.splitlines()
    for part in ("docs/s", "MB/s", "tokens/s", "% done", "left"):
        assert part in progress
    assert last.startswith("305 documents") and "all done" in last


def test_an_older_output_is_replaced_whole(tmp_path):
    for suffix in ("bin", "idx"):
        (tmp_path / f"mlm_text_document.{suffix}").write_bytes(b"older")
    assert run_on(GOLDEN / "docs.jsonl", tmp_path / "mlm", "--append-eod") == 0
    assert_golden(tmp_path, "mlm_text_document")


BAD_LINES = {
    b"{not json": "not valid JSON",
    b"": "not valid JSON",
    b'{"text": "cut o': "not valid JSON",
    b'["text"]': "a JSON list, not an object",
    b'{"title": "only"}': "has no key 'text', only title",
    b'{"text": 3}': "'text' holds int, not a string",
    b'{"text": null}': "'text' holds NoneType, not a string",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "the tokenizer refuses the text",
}


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line.decode(errors="replace"))
def test_a_bad_line_is_named(tmp_path, monkeypatch, capsys, line, workers):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 200)
    good = [json.dumps({"text": f"document {i}"}).encode() for i in range(60)]
    # Of two bad lines the first is reported, whichever worker meets its own first.
    lines = [*good[:41], line, *good[41:50], b"also bad", *good[50:]]
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert run_on(path, tmp_path / "out", "--workers", workers) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"{path}, line 42: {BAD_LINES[line]}" in message
    assert [p.name for p in tmp_path.iterdir()] == ["docs.jsonl"], "something was left behind"


def test_a_file_cut_off_is_named(tmp_path, capsys):
    path = tmp_path / "docs.jsonl.gz"
    path.write_bytes(gzip.compress((GOLDEN / "docs.jsonl").read_bytes())[:-2000])
    assert run_on(path, tmp_path / "out", "--workers", "2") == 1
    assert f"{path}: cannot be read" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["docs.jsonl.gz"]


class _DiesAtDocument30(encoding.DocumentEncoder):
    def __call__(self, block):
        if block.first_record > 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(block)


def test_a_killed_worker_stops_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(pipeline, "DocumentEncoder", _DiesAtDocument30)
    start = time.monotonic()
    assert run_on(GOLDEN / "docs.jsonl", tmp_path / "out", "--workers", "3") == 1
    assert time.monotonic() - start < 30
    message = capsys.readouterr().err
    assert "tokenizer worker" in message and "killed by SIGKILL" in message
    assert "fewer --workers" in message
    assert list(tmp_path.iterdir()) == []


class _Fails(encoding.DocumentEncoder):
    def __call__(self, block):
        raise ZeroDivisionError("a mistake of ours")


def test_a_failing_worker_shows_its_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "DocumentEncoder", _Fails)
    options = preprocess_data.parse_options(
        ["--input", str(GOLDEN / "docs.jsonl"), "--output-prefix", str(tmp_path / "out")]
        + [*TOKENIZER, "--workers", "2"]
    )
    with pytest.raises(WorkerError, match="(?s)Traceback.*ZeroDivisionError: a mistake of ours"):
        pipeline.preprocess(options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "absent.jsonl"], "--input absent.jsonl: no such file"),
        (["--tokenizer-model", "/absent"], "--tokenizer-model /absent: no such file or folder"),
        (["--tokenizer-type", "GPT2"], "--tokenizer-type GPT2: unknown"),
        (["--tokenizer-type", "NullTokenizer"], "NullTokenizer needs --vocab-size"),
        (["--workers", "0"], "--workers is 0: it must be at least 1"),
        (["--log-interval", "0"], "--log-interval is 0: it must be at least 1"),
        (["--json-keys", "text", "text"], "--json-keys: text is given twice"),
        (
            ["--json-key", "text"],
            "--json-key is not a flag of this program. Did you mean --json-keys?",
        ),
        (["--split-sentences"], "--split-sentences: sentence splitting serves BERT"),
        (["--find-optimal-num-workers"], "--find-optimal-num-workers: give --workers a number"),
    ],
)
def test_a_bad_flag_is_named(tmp_path, capsys, flags, message):
    assert run_on(GOLDEN / "docs.jsonl", tmp_path / "out", *flags) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_flags_of_megatron_lm_without_effect(tmp_path, capsys):
    """They and their values are left out, and said."""
    flags = ["--partitions", "2", "--keep-sequential-samples", "--dataset-impl=mmap"]
    assert run_on(GOLDEN / "docs.jsonl", tmp_path / "out", *flags, "--append-eod") == 0
    said = capsys.readouterr().err
    assert all(f"{flag.partition('=')[0]} has no effect" in said for flag in flags if flag != "2")
    written = (tmp_path / "out_text_document.bin").read_bytes()
    assert written == (GOLDEN / "mlm_text_document.bin").read_bytes()


def test_no_documents(tmp_path, capsys):
    path = tmp_path / "docs.jsonl"
    path.touch()
    assert run_on(path, tmp_path / "out", "--workers", "2") == 1
    assert "no documents" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["docs.jsonl"]


def test_a_tokenizer_without_end_of_document(tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((GOLDEN / "tokenizer/tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    flags = ["--tokenizer-model", str(folder), "--append-eod"]
    assert run_on(GOLDEN / "docs.jsonl", tmp_path / "out", *flags) == 1
    assert "has no end-of-sequence token" in capsys.readouterr().err


class _Slow(encoding.DocumentEncoder):
    started: Any

    def __call__(self, block):
        self.started.set()
        time.sleep(0.5)
        return super().__call__(block)


def _run_slowly_as_script(started, argv: list[str]) -> None:
    _Slow.started = started
    pipeline.DocumentEncoder = _Slow
    sources._BLOCK_BYTES = 1000
    sys.argv = ["preprocess_data.py", *argv]
    # Shells let what they start in the background ignore it, the tests as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runpy.run_path(str(ROOT / "tools/preprocess_data.py"), run_name="__main__")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
@pytest.mark.parametrize(
    ("number", "files_left"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 5)]
)
def test_workers_end_with_the_run(tmp_path, number, files_left):
    argv = ["--input", str(GOLDEN / "docs.jsonl"), "--output-prefix", str(tmp_path / "mlm")]
    argv += [*TOKENIZER, "--workers", "3"]
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    process = fork.Process(target=_run_slowly_as_script, args=(started, argv))
    process.start()
    assert started.wait(60), "no worker began"
    workers = _children(process.pid)
    assert len(workers) == 3
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode, "it must end, and not as a success"
    deadline = time.monotonic() + 20
    while any(map(_is_alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.05)
    assert len(list(tmp_path.iterdir())) == files_left
    assert not list(tmp_path.glob("*document.idx")), "unfinished output under its final name"
    # What a killed run left before its first record is in nobody's way.
    assert run_on(GOLDEN / "docs.jsonl", tmp_path / "mlm", "--append-eod") == 0
    assert_golden(tmp_path, "mlm_text_document")


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit, match="0"):
        preprocess_data.parse_options(["--help"])
    text = capsys.readouterr().out
    for flag in ("--input", "--output-prefix", "--json-keys", "--tokenizer-type", "--workers"):
        assert flag in text
