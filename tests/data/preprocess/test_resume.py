"""Interrupted runs, and the runs that go on with them."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_memory.data.indexed.lock import OutputLock
from megatron_memory.data.preprocess import outputs
from tools import preprocess_data

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests/golden/preprocess"
DOCS = GOLDEN / "docs.jsonl"
TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer"]
TOKENIZER += ["--tokenizer-model", str(GOLDEN / "tokenizer")]
PAIR = "mlm_text_document"


def run(folder: Path, *flags: str, inputs: list[Path] | None = None) -> int:
    argv = ["--input", *map(str, inputs or [DOCS]), "--output-prefix", str(folder / "mlm")]
    return preprocess_data.main([*argv, *TOKENIZER, "--append-eod", *flags])


def parts(folder: Path) -> list[Path]:
    """The golden documents in three files, one of them compressed."""
    folder.mkdir()
    lines = DOCS.read_bytes().splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:90]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[90:210])))
    (folder / "c.jsonl").write_bytes(b"".join(lines[210:]).rstrip(b"\n"))
    return sorted(folder.iterdir())


def interrupt_after(monkeypatch, num_blocks: int, error: BaseException) -> None:
    """The run ends with `error` in place of its next block."""
    add = outputs.Outputs.add
    left = [num_blocks]

    def add_or_end(self, block):
        if left[0] == 0:
            raise error
        left[0] -= 1
        add(self, block)

    monkeypatch.setattr(outputs.Outputs, "add", add_or_end)


def assert_complete(folder: Path) -> dict:
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {f"{PAIR}.{suffix}" for suffix in ("bin", "idx", "json")}
    for suffix in ("bin", "idx"):
        assert (folder / f"{PAIR}.{suffix}").read_bytes() == (
            GOLDEN / f"{PAIR}.{suffix}"
        ).read_bytes()
    return json.loads((folder / f"{PAIR}.json").read_text())


@pytest.mark.parametrize(("num_blocks", "workers"), [(1, "1"), (14, "2"), (28, "1"), (42, "2")])
def test_resumed_output_is_that_of_one_run(
    tmp_path, monkeypatch, often, capsys, num_blocks, workers
):
    inputs = parts(tmp_path / "parts")
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_blocks, KeyboardInterrupt())
        assert run(tmp_path, "--workers", workers, inputs=inputs) == 1
    assert "--resume goes on from there" in capsys.readouterr().err
    assert not (tmp_path / f"{PAIR}.idx").exists()
    assert run(tmp_path, "--workers", "2", "--resume", inputs=inputs) == 0
    assert "--resume: going on after" in capsys.readouterr().err
    manifest = assert_complete(tmp_path)
    assert [source["lines"] for source in manifest["sources"]] == [90, 120, 95]
    (tmp_path / "again").mkdir()
    assert run(tmp_path / "again", inputs=inputs) == 0
    assert manifest == assert_complete(tmp_path / "again")


def as_script(folder: Path, *flags: str, source: str = "") -> subprocess.Popen:
    """The tool in a process, with small blocks, records after each, and `source` before it."""
    argv = ["--input", str(DOCS), "--output-prefix", str(folder / "mlm"), *TOKENIZER]
    script = (
        "import os, sys\n"
        "from megatron_memory.data.preprocess import outputs, sources\n"
        "from tools import preprocess_data\n"
        "sources._BLOCK_BYTES = 1000\n"
        "outputs._SECONDS_BETWEEN_RECORDS = 0.0\n"
        "os.fsync = lambda descriptor: None\n"
        f"{source}\n"
        f"sys.exit(preprocess_data.main({[*argv, '--append-eod', *flags]!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


_KILL_AT_20 = """
add = outputs.Outputs.add
def add_or_die(self, block):
    if self.num_documents() > 120:
        self._writers["text"]._tokens.write(bytes(100_000))
        self._writers["text"]._tokens.flush()
        with open(self.journal.path, "ab") as stream:
            stream.write(b'{"extents": {"cut o')
        os.killpg(0, 9)
    add(self, block)
outputs.Outputs.add = add_or_die
"""


def test_killed_with_all_its_workers(tmp_path):
    process = as_script(tmp_path, "--workers", "3", source=_KILL_AT_20)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (tmp_path / f"{PAIR}.bin.partial").exists() and not (tmp_path / f"{PAIR}.bin").exists()
    assert run(tmp_path, "--resume", "--workers", "2") == 0
    assert_complete(tmp_path)


def test_an_interrupted_run_is_not_overwritten(tmp_path, monkeypatch, often, capsys):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, KeyboardInterrupt())
        assert run(tmp_path) == 1
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert run(tmp_path) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "an interrupted run left" in message and "--resume" in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    # The fix that the message names.
    (tmp_path / f"{PAIR}.journal").unlink()
    assert run(tmp_path) == 0
    assert_complete(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--json-keys", "text", "title"], "--json-keys was ['text'] in the interrupted run"),
        (["--tokenizer-hf-include-special-tokens"], "include-special-tokens was False"),
        (["--tokenizer-type", "ByteLevelTokenizer"], "the tokenizer was"),
    ],
)
def test_other_options_are_refused(tmp_path, monkeypatch, often, capsys, flags, message):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, KeyboardInterrupt())
        assert run(tmp_path) == 1
    assert run(tmp_path, "--resume", *flags) == 1
    assert message in capsys.readouterr().err
    assert run(tmp_path, "--resume") == 0
    assert_complete(tmp_path)


def test_inputs_that_changed_are_refused(tmp_path, monkeypatch, often, capsys):
    inputs = parts(tmp_path / "parts")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 30, KeyboardInterrupt())
        assert run(tmp_path, inputs=inputs) == 1
    assert run(tmp_path, "--resume", inputs=inputs[:2]) == 1
    assert "3 files then, 2 now" in capsys.readouterr().err
    os.utime(inputs[0], (1, 1))
    assert run(tmp_path, "--resume", inputs=inputs) == 1
    assert f"have changed since ({inputs[0]})" in capsys.readouterr().err


def test_compressed_text_is_held_to_what_was_read(tmp_path, monkeypatch, often, capsys):
    source = tmp_path / "docs.jsonl.gz"
    text = DOCS.read_bytes()
    # Stored, so that another text makes a file of the same size.
    source.write_bytes(gzip.compress(text, 0, mtime=0))
    stat = source.stat()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 30, KeyboardInterrupt())
        assert run(tmp_path, inputs=[source]) == 1
    source.write_bytes(gzip.compress(text.replace(b"the", b"THE"), 0, mtime=0))
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert run(tmp_path, "--resume", inputs=[source]) == 1
    assert "is not what the interrupted run read" in capsys.readouterr().err


def test_resume_without_an_interrupted_run_begins(tmp_path, capsys):
    assert run(tmp_path, "--resume") == 0
    assert_complete(tmp_path)
    before = (tmp_path / f"{PAIR}.bin").stat().st_mtime_ns
    assert run(tmp_path, "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert (tmp_path / f"{PAIR}.bin").stat().st_mtime_ns == before
    # Without the flag a complete output is made again.
    assert run(tmp_path) == 0
    assert (tmp_path / f"{PAIR}.bin").stat().st_mtime_ns > before


def test_lines_that_were_skipped_are_not_missed_by_other_flags(
    tmp_path, monkeypatch, often, capsys
):
    source = tmp_path / "in" / "docs.jsonl"
    source.parent.mkdir()
    lines = sorted(DOCS.read_bytes().splitlines(keepends=True), key=len, reverse=True)
    source.write_bytes(b"".join(lines))
    skip = ("--on-error", "skip", "--max-document-bytes", str(len(lines[1])))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20, KeyboardInterrupt())
        assert run(tmp_path, *skip, inputs=[source]) == 1
    assert run(tmp_path, "--resume", inputs=[source]) == 1
    message = capsys.readouterr().err
    assert "has skipped 1 bad lines, and --on-error is stop now" in message
    assert run(tmp_path, "--resume", *skip, inputs=[source]) == 0
    assert run(tmp_path, "--resume", *skip, inputs=[source]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    # A complete output that lacks a line is none for flags that would have it.
    assert run(tmp_path, "--resume", "--on-error", "skip", inputs=[source]) == 0
    assert run(tmp_path / "again", inputs=[source]) == 0
    for suffix in ("bin", "idx", "json"):
        (one, other) = (folder / f"{PAIR}.{suffix}" for folder in (tmp_path, tmp_path / "again"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_between_two_renames(tmp_path, monkeypatch, often, renamed):
    replace, left = os.replace, [renamed]

    def replace_or_end(source, destination):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, destination)

    (tmp_path / f"{PAIR}.bin").write_bytes(b"older")
    (tmp_path / f"{PAIR}.idx").write_bytes(b"older")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_end)
        assert run(tmp_path) == 1
    assert not (tmp_path / f"{PAIR}.idx").exists() or renamed in (0, 2)
    assert run(tmp_path, "--resume") == 0
    assert_complete(tmp_path)


def test_one_writer_at_a_time(tmp_path, capsys):
    with OutputLock(str(tmp_path / PAIR)):
        assert run(tmp_path) == 1
        assert f"another process ({os.getpid()}) is writing" in capsys.readouterr().err
    assert run(tmp_path) == 0
    assert_complete(tmp_path)


def test_two_runs_at_once(tmp_path):
    processes = [as_script(tmp_path, "--workers", "2") for _ in range(3)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or "is writing this output" in error, error
    assert_complete(tmp_path)


def _interrupt(folder: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10, KeyboardInterrupt())
        assert run(folder) == 1


def test_outputs_are_found_beside_the_journal_from_wherever(tmp_path, monkeypatch, often, capsys):
    """The same output by a path from another folder, or after its folder has moved."""
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    _interrupt(Path("one"), monkeypatch)
    monkeypatch.chdir(tmp_path / "one")
    with monkeypatch.context() as patch:
        # Complete but for its names, which the next run gives it.
        patch.setattr(outputs.PairWriter, "publish", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(Path("."), "--resume") == 1
    (tmp_path / "one").rename(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert run(Path("two"), "--resume") == 0
    assert_complete(tmp_path / "two")


def test_files_under_another_name_are_no_part_of_the_run(tmp_path, monkeypatch, often, capsys):
    _interrupt(tmp_path, monkeypatch)
    for path in tmp_path.iterdir():
        path.rename(path.with_name(path.name.replace("mlm", "new")))
    flags = ["--input", str(DOCS), "--output-prefix", str(tmp_path / "new"), *TOKENIZER]
    assert preprocess_data.main([*flags, "--append-eod", "--resume"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "new_text_document.journal: is of" in error and "give the files their names" in error


def test_a_changed_digit_of_the_journal_or_a_lost_file_is_refused(
    tmp_path, monkeypatch, often, capsys
):
    _interrupt(tmp_path, monkeypatch)
    journal = tmp_path / f"{PAIR}.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    changed = lines[-1].replace(b'"records": ', b'"records": 1', 1)
    for content in (lines[:-1] + [changed], lines[:3] + lines[4:], lines[1:]):
        journal.write_bytes(b"".join(content))
        assert run(tmp_path, "--resume") == 1
        assert f"{journal}: damaged" in capsys.readouterr().err
    journal.write_bytes(b"".join(lines))
    (tmp_path / f"{PAIR}.bin.partial").rename(tmp_path / "aside")
    assert run(tmp_path, "--resume") == 1
    assert f"{PAIR}.bin.partial: 0 bytes, where" in capsys.readouterr().err
    (tmp_path / "aside").rename(tmp_path / f"{PAIR}.bin.partial")
    assert run(tmp_path, "--resume") == 0
    assert_complete(tmp_path)
    # A pair that lost a file since is made again.
    (tmp_path / f"{PAIR}.bin").unlink()
    assert run(tmp_path, "--resume") == 0
    assert_complete(tmp_path)


def test_a_pipe_in_the_journals_place_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / f"{PAIR}.journal")
    assert run(tmp_path) == 1
    assert "no regular file" in capsys.readouterr().err
