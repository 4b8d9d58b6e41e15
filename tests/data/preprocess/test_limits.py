"""Bad lines, dead workers, full disks, and memory."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_memory.data.preprocess import encoding, pipeline, sources
from tests.data.preprocess.test_resume import DOCS, ROOT, TOKENIZER, assert_complete, run

BAD = [b"{not json", b"", b'{"title": "only"}', b'{"text": 3}', b'{"text": "\xff"}', b"[1]"]
BAD += [b'{"text": "\\ud800"}', b'{"text": 1' + b"0" * 5000 + b"}", b"[" * 100_000]
BAD += [b'{"text": "a"', b', "b": 1}', b'{"text": "a"} {"text": "b"}', b"{}", b"null"]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_bad_lines_are_left_out_on_request(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 2000)
    lines = DOCS.read_bytes().splitlines()
    for number, line in enumerate(BAD):
        lines.insert(20 * number + 10, line)
    path = tmp_path / "in" / "docs.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join(lines) + b"\n")
    flags = ("--on-error", "skip", "--workers", workers)
    assert run(tmp_path, *flags, inputs=[path]) == 0
    errors = capsys.readouterr().err
    assert errors.count("skipped: ") == 11, "ten lines, and that the others are counted"
    assert f"skipped: {path}, line 11: not valid JSON" in errors
    assert f"skipped: {path}, line 51: has no key 'text'" in errors
    assert f"{len(BAD)} bad lines skipped" in errors
    assert assert_complete(tmp_path)["skipped_lines"] == len(BAD)


def test_a_block_of_bad_lines_is_only_counted(tmp_path, often, capsys):
    path = tmp_path / "in" / "docs.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n" * 300 + b'{"text": "good"}\n' + b"\n" * 5000)
    assert run(tmp_path, "--on-error", "skip", inputs=[path]) == 0
    errors = capsys.readouterr().err
    assert errors.count("skipped: ") == 11 and "5,300 bad lines skipped" in errors


@pytest.mark.parametrize("text", ["a\nb", "", "\u2028\x85\x1c", '"\\', "\x7f\u0000"])
def test_a_block_is_read_as_its_lines_are(text):
    """The scan of a whole block against json.loads of each line, on text that could confuse it."""
    from megatron_memory.data.preprocess.blocks import LineBlock, Position
    from megatron_memory.data.preprocess.documents import read_documents

    for form in ('{"text": %s}', ' {"text": %s}\t', '{"x": [{"text": 1}], "text": %s}\r'):
        lines = [form % json.dumps(text, ensure_ascii=escaped) for escaped in (True, False)] * 2
        data = "".join(line + "\n" for line in lines).encode()
        block = LineBlock(first_record=1, num_bytes=len(data), end=Position(), lines=data)
        found = read_documents(block, ("text",))
        assert found.texts["text"] == [json.loads(line)["text"] for line in lines]
        assert found.problems == [] and list(found.numbers) == [1, 2, 3, 4]


def test_two_lines_are_not_one_document():
    from megatron_memory.data.preprocess.blocks import LineBlock, Position
    from megatron_memory.data.preprocess.documents import read_documents

    for data in (b'{"text": "a",\n"x": 1}\n{"text": "b"}\n', b'{"text":\n"a"}\n{"text": "b"}\n'):
        block = LineBlock(first_record=7, num_bytes=len(data), end=Position(), lines=data)
        found = read_documents(block, ("text",))
        assert found.texts["text"] == ["b"] and list(found.numbers) == [9]
        assert [number for number, _ in found.problems] == [7, 8]


def test_a_key_twice_is_refused():
    from megatron_memory.data.preprocess.blocks import LineBlock, Position
    from megatron_memory.data.preprocess.documents import read_documents

    lines = [
        b'{"text": "a", "text": "b"}',
        b'{"text": "c", "x": {"text": "d", "x": 1, "x": 2}, "type": "text", "x": 3}',
        b'{"x": "\\"text\\": 1", "text" :"text"}',
        b'{"text": "e", "te\\u0078t": "e"}',
    ]
    data = b"\n".join(lines) + b"\n"
    block = LineBlock(first_record=1, num_bytes=len(data), end=Position(), lines=data)
    found = read_documents(block, ("text",))
    assert found.texts["text"] == ["c", "text"]
    assert [number for number, _ in found.problems] == [1, 4]
    assert "has the key 'text' more than once" in found.problems[0][1]


@pytest.mark.parametrize(
    "key, lines",
    [
        ("text", ['{"text": "a", "te\\u0078t": "b"}', '{"text": "c"}']),
        ("text", ['{"te\\u0078t": "c"}', '{"text": "a", "text": "b"}']),
        ("téxt", ['{"t\\u00e9xt": "a", "t\\u00e9xt": "b"}', '{"t\\u00e9xt": "c"}']),
        ("a/b", ['{"a\\/b": "a", "a/b": "b"}', '{"a/b": "c"}']),
    ],
)
def test_a_key_twice_is_refused_in_any_spelling(key, lines):
    from megatron_memory.data.preprocess.blocks import LineBlock, Position
    from megatron_memory.data.preprocess.documents import read_documents

    data = "".join(line + "\n" for line in lines).encode()
    block = LineBlock(first_record=1, num_bytes=len(data), end=Position(), lines=data)
    found = read_documents(block, (key,))
    assert found.texts[key] == ["c"]
    assert [text.split(":")[0] for _, text in found.problems] == [
        f"has the key {key!r} more than once"
    ]


class _DiesAtDocument30(encoding.DocumentEncoder):
    how: tuple = ()

    def __call__(self, block):
        if block.first_record > 30:
            call, *arguments = self.how
            call(*arguments)
        return super().__call__(block)


class _Killed(_DiesAtDocument30):
    def __call__(self, block):
        self.how = (os.kill, os.getpid(), signal.SIGKILL)
        return super().__call__(block)


class _Exits(_DiesAtDocument30):
    how = (os._exit, 137)


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (_Killed, "was killed by SIGKILL. If the machine ran out"),
        (_Exits, "ended with exit code 137"),
    ],
)
def test_a_dead_worker_is_named(tmp_path, monkeypatch, often, capsys, encoder, reason):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "DocumentEncoder", encoder)
        assert run(tmp_path, "--workers", "3") == 1
    assert reason in capsys.readouterr().err
    assert run(tmp_path, "--workers", "3", "--resume") == 0
    assert_complete(tmp_path)


class _WrongFromDocument100(pipeline.FastEncoder):
    num_texts = 0

    def __call__(self, texts):
        self.num_texts += len(texts)
        if self.num_texts > 100:
            raise pipeline.TokenMismatch("gigatoken gives [1] where the tokenizer itself gives [2]")
        return super().__call__(texts)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_difference_on_the_way_starts_over_without_gigatoken(
    tmp_path, monkeypatch, often, capsys, workers
):
    monkeypatch.setattr(pipeline, "FastEncoder", _WrongFromDocument100)
    assert run(tmp_path, "--workers", workers) == 0
    errors = capsys.readouterr().err
    assert errors.count("starting over without gigatoken") == 1
    assert_complete(tmp_path)


def test_without_gigatoken_the_tokens_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "FastEncoder", None)
    assert run(tmp_path, "--no-gigatoken") == 0
    assert_complete(tmp_path)


_ON_A_FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
from megatron_memory.data.preprocess import outputs, sources
from tools import preprocess_data

folder = Path(sys.argv[1])
size = lambda kib, *options: subprocess.run(
    ["mount", "-t", "tmpfs", "-o", f"size={kib}k" + "".join(options), "tmpfs", str(folder)],
    check=True,
)
size(sys.argv[2])
for suffix in ("bin", "idx"):
    (folder / f"mlm_text_document.{suffix}").write_bytes(b"older")
sources._BLOCK_BYTES = 1000
outputs._SECONDS_BETWEEN_RECORDS = 0.0
argv = sys.argv[3:]
assert preprocess_data.main(argv) == 1
for suffix in ("bin", "idx"):
    assert (folder / f"mlm_text_document.{suffix}").read_bytes() == b"older"
size(1024, ",remount")
assert preprocess_data.main([*argv, "--resume"]) == 0
for path in folder.iterdir():
    (Path(sys.argv[1] + "-copy") / path.name).write_bytes(path.read_bytes())
"""


def _can_mount() -> bool:
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not _can_mount(), reason="may not mount a small tmpfs here (unshare -rm)")
@pytest.mark.parametrize(("kibibytes", "workers"), [("24", "1"), ("44", "1"), ("44", "2")])
def test_a_full_disk(tmp_path, kibibytes, workers):
    folder, copy = tmp_path / "full", tmp_path / "full-copy"
    folder.mkdir()
    copy.mkdir()
    argv = ["--input", str(DOCS), "--output-prefix", str(folder / "mlm"), *TOKENIZER]
    argv += ["--append-eod", "--workers", workers]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [
            "unshare",
            "-rm",
            sys.executable,
            "-c",
            _ON_A_FULL_DISK,
            str(folder),
            str(kibibytes),
            *argv,
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written: No space left on device." in done.stderr
    assert "Nothing that was there is changed" in done.stderr
    # The smaller disk is full before anything is recorded: nothing is kept.
    assert ("--resume goes on from there" in done.stderr) == (kibibytes == "44")
    assert ("--resume: going on after" in done.stderr) == (kibibytes == "44")
    assert_complete(copy)


_ON_ENDLESS_LINES = """
import resource, sys
from tools import preprocess_data

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(path, on_error):
    argv = ["--input", path, "--output-prefix", f"{path}-{on_error}", "--on-error", on_error]
    return preprocess_data.main([*argv, "--max-document-bytes", str(1 << 20), *sys.argv[2:]])

assert run(sys.argv[1] + "/plain.jsonl", "stop") == 0
before = peak()
for name in ("endless.jsonl", "endless.jsonl.gz", "endless.jsonl.zst", "dictionary.parquet",
             "prefixes.parquet"):
    assert run(f"{sys.argv[1]}/{name}", "stop") == 1, name
    assert run(f"{sys.argv[1]}/{name}", "skip") == 0, name
assert run(sys.argv[1] + "/page.parquet", "skip") == 1
assert run(sys.argv[1] + "/nulls.parquet", "skip") == 1
print(peak() - before)
"""


def _write_endless(folder: Path, num_bytes: int) -> None:
    """Files of some kilobytes that say 192 MiB, with a document before and one behind."""
    begin, end = b'{"text": "a b"}\n{"text": "', b'"}\n{"text": "c d"}\n'
    (folder / "plain.jsonl").write_bytes(begin + end)
    with open(folder / "endless.jsonl", "wb") as stream:
        stream.write(begin)
        stream.seek(num_bytes, os.SEEK_CUR)  # A hole, which reads as zeros.
        stream.write(end)
    zeros = bytes(1 << 20)
    with gzip.open(folder / "endless.jsonl.gz", "wb", compresslevel=1) as stream:
        stream.write(begin)
        for _ in range(num_bytes // len(zeros)):
            stream.write(zeros)
        stream.write(end)
    with zstandard.open(folder / "endless.jsonl.zst", "wb") as stream:
        stream.write(begin)
        for _ in range(num_bytes // len(zeros)):
            stream.write(zeros)
        stream.write(end)
    write, size = pyarrow.parquet.write_table, 2 << 20
    values = pyarrow.array(["a b", "x" * size])
    column = pyarrow.DictionaryArray.from_arrays([0] + [1] * (num_bytes // size), values)
    plain = {"store_schema": False, "compression": "zstd"}
    write(pyarrow.table({"text": column}), folder / "dictionary.parquet", **plain)
    column = pyarrow.array(["a b"] + ["x" * size] * 60)
    options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    write(pyarrow.table({"text": column}), folder / "prefixes.parquet", **options)
    column = pyarrow.array(["x" * (9 << 20)])
    write(pyarrow.table({"text": column}), folder / "page.parquet", compression="zstd")
    nulls = pyarrow.nulls(300_000, pyarrow.string())
    write(pyarrow.table({"text": nulls}), folder / "nulls.parquet", row_group_size=1 << 30)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_does_not_follow_what_a_small_file_says(tmp_path):
    """One line of 192 MiB, and so many rows of 2 MiB or of nothing; the limit is 1 MiB. A
    batch of a table may have 16 MiB, which are there as pyarrow's and as Python's."""
    num_bytes = 192 << 20
    _write_endless(tmp_path, num_bytes)
    command = [sys.executable, "-c", _ON_ENDLESS_LINES, str(tmp_path), *TOKENIZER]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "line 2: longer than --max-document-bytes 1,048,576" in done.stderr
    assert "dictionary.parquet, row 2: longer than" in done.stderr
    assert "2 documents" in done.stderr and "96 bad lines skipped" in done.stderr
    grown = int(done.stdout.split()[-1])
    assert grown < 80 << 20, f"{grown / 2**20:.0f} MiB"


def _peak_bytes(folder: Path, num_bytes: int) -> int:
    """Resident memory of the tool or one of its workers, the largest, for a generated stream."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", "-", *TOKENIZER]
    command += ["--output-prefix", str(folder / str(num_bytes)), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    lines = b'{"text": "a b"}\n' * 10_000

    def feed() -> None:
        for _ in range(num_bytes // len(lines)):
            process.stdin.write(lines)
        process.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    _, status, usage = os.wait4(process.pid, 0)
    feeder.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    # 400,000 documents more: their lengths and bounds in Python's lists would take 20 MB.
    small, large = (_peak_bytes(tmp_path, num_bytes) for num_bytes in (2_400_000, 8_800_000))
    assert large - small < 5_000_000
    assert (tmp_path / "8800000_text_document.idx").stat().st_size > 10_000_000


def test_workers_that_cannot_be_started(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 12, before[1]))
    try:
        assert run(tmp_path, "--workers", "90") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    message = capsys.readouterr().err
    assert "--workers 90: they cannot be started" in message and "ulimit -n" in message
    assert list(tmp_path.iterdir()) == []
    assert run(tmp_path, "--workers", "2") == 0
