"""Kinds of input: files, folders, patterns, standard input; plain, compressed, tables."""

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_memory.data.preprocess import parquet, pipeline, sources, streams
from megatron_memory.data.preprocess.blocks import RecordLimit
from megatron_memory.data.preprocess.inputs import expand_inputs
from megatron_memory.data.preprocess.parquet_pages import largest_page
from megatron_memory.exceptions import ConfigurationError, DataError
from tests.data.preprocess.test_resume import (
    DOCS,
    GOLDEN,
    ROOT,
    TOKENIZER,
    assert_complete,
    interrupt_after,
    run,
)

LIMIT = RecordLimit(max_bytes=2**20)


def write_gzip(path: Path, data: bytes) -> None:
    middle = len(data) // 2
    # Two members, as of `cat a.gz b.gz`.
    path.write_bytes(gzip.compress(data[:middle]) + gzip.compress(data[middle:]))


def write_zstd(path: Path, data: bytes) -> None:
    middle, compress = len(data) // 2, zstandard.ZstdCompressor().compress
    path.write_bytes(compress(data[:middle]) + compress(data[middle:]) + compress(b""))


def write_parquet(path: Path, data: bytes) -> None:
    texts = [json.loads(line)["text"] for line in data.splitlines()]
    table = pyarrow.table({"other": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=37)


WRITERS = {
    "plain.jsonl": Path.write_bytes,
    "crlf.jsonl": lambda path, data: path.write_bytes(data.replace(b"\n", b"\r\n")),
    "no_end.jsonl": lambda path, data: path.write_bytes(data.rstrip(b"\n")),
    "members.jsonl.gz": write_gzip,
    "frames.jsonl.zst": write_zstd,
    "table.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_gives_the_same_tokens(tmp_path, often, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    WRITERS[name](path, DOCS.read_bytes())
    assert run(tmp_path, "--workers", "2", inputs=[path]) == 0
    (source,) = assert_complete(tmp_path)["sources"]
    assert source["path"] == str(path) and source["bytes"] == path.stat().st_size
    assert source["lines"] == 305


@pytest.mark.parametrize(
    ("name", "num_blocks"), [("frames.jsonl.zst", 20), ("table.parquet", 1), ("table.parquet", 12)]
)
def test_each_kind_can_be_gone_on_with(tmp_path, monkeypatch, often, name, num_blocks):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    WRITERS[name](path, DOCS.read_bytes())
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_blocks, KeyboardInterrupt())
        assert run(tmp_path, inputs=[path]) == 1
    monkeypatch.setattr(parquet, "_BLOCK_BYTES", 700)
    assert run(tmp_path, "--resume", inputs=[path]) == 0
    manifest = assert_complete(tmp_path)
    (tmp_path / "again").mkdir()
    assert run(tmp_path / "again", inputs=[path]) == 0
    assert assert_complete(tmp_path / "again") == manifest


def pipe(folder: Path, data: bytes, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/preprocess_data.py", "--input", "-", *TOKENIZER, *flags]
    command += ["--output-prefix", str(folder / "mlm"), "--append-eod", "--log-interval", "100"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, cwd=ROOT, env=environment, input=data, capture_output=True)


def test_standard_input(tmp_path):
    done = pipe(tmp_path, DOCS.read_bytes(), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert_complete(tmp_path)
    assert b"so far" in done.stderr and b"left" not in done.stderr
    (tmp_path / "bad").mkdir()
    done = pipe(tmp_path / "bad", b'{"text": "good"}\nbad\n')
    assert done.returncode == 1 and b"-, line 2: not valid JSON" in done.stderr
    assert list((tmp_path / "bad").iterdir()) == []


def test_folders_and_patterns(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("z.jsonl", "a.parquet", "b/2.jsonl.gz", "b/10.jsonl.zst", ".c.jsonl", "d.json"):
        (folder / name).touch()
    (folder / ".hidden/e.jsonl").touch()
    (folder / "notes.txt").touch()
    names = ("a.parquet", "b/10.jsonl.zst", "b/2.jsonl.gz", "z.jsonl")
    assert expand_inputs([str(folder)]) == [str(folder / name) for name in names]
    assert expand_inputs([f"{folder}/*.json*"]) == [str(folder / n) for n in ("d.json", "z.jsonl")]
    assert expand_inputs([f"{folder}/**/*.gz"]) == [str(folder / "b/2.jsonl.gz")]
    twice = expand_inputs([str(folder / "z.jsonl"), str(folder / "b"), str(folder / "z.jsonl")])
    assert [Path(path).name for path in twice] == [
        "z.jsonl",
        "10.jsonl.zst",
        "2.jsonl.gz",
        "z.jsonl",
    ]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["absent.jsonl"], DataError, "no such file"),
        (["*.absent"], DataError, "no such file"),
        (["empty"], DataError, "no file below this folder ends with .jsonl"),
        (["-", "a.jsonl"], ConfigurationError, "cannot be combined"),
        (["a.tar.gz"], ConfigurationError, "this kind of file is not read"),
    ],
)
def test_inputs_that_are_refused(tmp_path, monkeypatch, names, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(error, match=f"--input .*{message}"):
        expand_inputs(names)


def test_links_are_followed_as_is_said(tmp_path, capsys):
    """To files; not from a folder to another, so that a loop is none."""
    folder, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "b.jsonl").touch()
    (folder / "a.jsonl").symlink_to("../elsewhere/b.jsonl")
    (folder / "loop").symlink_to(folder)
    (folder / "other").symlink_to(elsewhere)
    assert expand_inputs([str(folder)]) == [str(folder / "a.jsonl")]
    said = capsys.readouterr().err
    assert f"--input {folder}/a.jsonl: a link to {elsewhere}/b.jsonl, which is read" in said
    for name in ("loop", "other"):
        assert f"--input {folder}/{name}: a link to a folder is not followed; name it" in said
    assert expand_inputs([str(folder / "other")]) == [str(folder / "other/b.jsonl")]
    assert expand_inputs([f"{folder}/*"]) == [str(folder / "a.jsonl")]


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to nothing", "link to itself"])
def test_what_is_no_file_is_refused(tmp_path, kind):
    """Before it is opened, for that might hang: in a folder, by name, and by a pattern."""
    path = tmp_path / "x.jsonl"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        path = Path(tempfile.mkdtemp(dir="/tmp")) / "x.jsonl"  # Its name must be short.
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        targets = {"device": "/dev/zero", "link to nothing": "absent", "link to itself": path}
        path.symlink_to(targets[kind])
    message = f"a {kind}, not a file.*--input -" if "link" not in kind else "a link to .*cannot be"
    for name in (path.parent, path, f"{path.parent}/*"):
        with pytest.raises(DataError, match=f"--input {path}.*{message}"):
            expand_inputs([str(name)])


CUTS = [("members.jsonl.gz", 0.3), ("members.jsonl.gz", 0.99), ("frames.jsonl.zst", 0.3)]
CUTS += [("frames.jsonl.zst", 0.99), ("table.parquet", 0.5), ("table.parquet", 0.99)]


@pytest.mark.parametrize(("name", "share"), CUTS)
def test_a_file_cut_off_is_named(tmp_path, capsys, name, share):
    path = tmp_path / name
    WRITERS[name](path, DOCS.read_bytes())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert run(tmp_path, inputs=[path]) == 1
    assert f"--input {path}: cannot be read" in capsys.readouterr().err
    assert [left.name for left in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["members.jsonl.gz", "frames.jsonl.zst", "table.parquet"])
def test_damage_is_named_or_harmless(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path, DOCS.read_bytes()[:4000].rpartition(b"\n")[0])
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            for block in sources.read_blocks([str(path)], ("text",), limit=LIMIT):
                assert block.num_bytes >= 0
        except DataError:
            continue


def test_a_frame_that_grows_a_thousandfold(tmp_path):
    path = tmp_path / "zeros.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(10_000_000)))
    with streams.open_text(str(path)) as (stream, _):
        assert len(stream.read(1000)) == 1000
        assert len(stream.read()) == 10_000_000 - 1000


BAD_TABLES = {
    "no column 'text', only words": {"words": ["a"]},
    "column 'text' holds int64, not strings": {"text": [1, 2]},
    "column 'text' holds list<.*>, not strings": {"text": [["a"], ["b"]]},
    "row 2: 'text' holds null": {"text": ["a", None, "b"]},
}


@pytest.mark.parametrize("message", BAD_TABLES)
def test_a_bad_table_is_named(tmp_path, message):
    path = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.table(BAD_TABLES[message]), path)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        pipeline.preprocess(pipeline_options(path, tmp_path / "out"))
    assert [left.name for left in tmp_path.iterdir()] == ["bad.parquet"]


def pipeline_options(path: Path, prefix: Path, **options) -> pipeline.PreprocessOptions:
    return pipeline.PreprocessOptions(
        input=(str(path),),
        output_prefix=str(prefix),
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(GOLDEN / "tokenizer"),
        **options,
    )


@pytest.mark.parametrize(("ending", "package"), [("zst", "zstandard"), ("parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, ending, package):
    monkeypatch.setattr("megatron_memory.optional.is_installed", lambda name: False)
    path = tmp_path / f"docs.{ending}"
    path.write_bytes(b"anything")
    with pytest.raises(ConfigurationError, match=rf"{package} is not installed.*\[data\]"):
        pipeline.preprocess(pipeline_options(path, tmp_path / "out"))


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
@pytest.mark.parametrize("limit", [1, 8, 29, 30, 50, 1000])
def test_lines_longer_than_a_block_and_than_the_limit(monkeypatch, block, limit):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", block)
    for data in (b"a" * 50 + b"\nbc\n\n" + b"d" * 8 + b"\n" + b"e" * 30, b"", b"\n", b"x" * 51):
        pieces = list(sources._pieces(io.BytesIO(data), limit))
        assert b"".join(piece.data for piece in pieces) == data
        assert sum(map(sources._num_records, pieces)) == data.count(b"\n") + (data[-1:] > b"\n")
        lines = [line for line in data.split(b"\n") if len(line) <= limit]
        short = b"".join(piece.data for piece in pieces if not piece.is_long)
        assert [line for line in short.split(b"\n") if line] == [line for line in lines if line]
        assert max((len(piece.data) for piece in pieces), default=0) <= limit + 2 * block


def test_pages_are_measured_before_they_are_read(tmp_path):
    """Against pyarrow's own sum of a column's pages with their headers, for each encoding."""
    texts = [f"text {i} " * (i % 50) for i in range(5000)]
    table = pyarrow.table({"text": texts})
    for options in (
        {"use_dictionary": False},
        {"use_dictionary": True, "write_statistics": True},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"data_page_version": "2.0", "compression": "zstd"},
        {"data_page_size": 1000, "write_page_checksum": True},
    ):
        path = tmp_path / "table.parquet"
        pyarrow.parquet.write_table(table, path, **options)
        column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0)
        with open(path, "rb") as stream:
            largest = largest_page(stream, column)
            stream.seek(0)
            assert largest <= column.total_uncompressed_size
            assert largest > 500 if "data_page_size" in options else 10_000
            damaged = io.BytesIO(b"\xff" * path.stat().st_size)
        with pytest.raises(ValueError, match="page"):
            largest_page(damaged, column)


def _long_rows(path: Path, value: str) -> None:
    column = pyarrow.array(["first", value, None, value, "last"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, store_schema=False)


def test_rows_longer_than_the_limit(tmp_path, capsys):
    path = tmp_path / "long.parquet"
    _long_rows(path, "x" * 1001)
    options = {"max_document_bytes": 1000}
    with pytest.raises(DataError, match=f"{path}, row 2: longer than --max-document-bytes 1,000"):
        pipeline.preprocess(pipeline_options(path, tmp_path / "out", **options))
    pipeline.preprocess(pipeline_options(path, tmp_path / "out", on_error="skip", **options))
    errors = capsys.readouterr().err
    assert "2 documents" in errors and "3 bad lines skipped" in errors
    _long_rows(path, "x" * 9000)
    with pytest.raises(DataError, match="row group 0 has a page of .* bytes.*smaller pages"):
        pipeline.preprocess(pipeline_options(path, tmp_path / "again", **options))
