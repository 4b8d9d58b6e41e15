"""tools/dataset.py: pairs looked at, checked, merged and split."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_memory.data.indexed import contents, merge, streaming
from megatron_memory.data.indexed.lock import OutputLock
from megatron_memory.data.indexed.writer import PairWriter
from tests.data.helpers import GOLDEN, random_documents, write_dataset
from tools import dataset

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ["--tokenizer-type", "HuggingFaceTokenizer"]
TOKENIZER += ["--tokenizer-model", str(GOLDEN / "tokenizer")]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces for each of the small pairs here, and no waiting for a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(streaming, "CHUNK", 7)
    monkeypatch.setattr(contents, "CHUNK", 7)


def write_sentences(prefix: Path, seed: int, dtype=np.uint16) -> str:
    """A pair whose documents have no, one or several sequences, as of --split-sentences."""
    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for _ in range(20):
        lengths = random.integers(1, 9, random.integers(0, 4)).tolist()
        builder.add_document(random.integers(0, 1000, sum(lengths)).astype(dtype), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def pairs(tmp_path):
    mine = write_dataset(tmp_path / "c", [[], *random_documents(25), []])
    return [write_sentences(tmp_path / "b", 1), mine, write_sentences(tmp_path / "a", 2)]


def merged_by_megatron(prefixes, output: Path, dtype=np.uint16) -> str:
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype)
    for prefix in prefixes:
        builder.add_index(prefix)
    builder.finalize(f"{output}.idx")
    return str(output)


def assert_equal(one: str, other: str) -> None:
    for suffix in (".bin", ".idx"):
        assert Path(one + suffix).read_bytes() == Path(other + suffix).read_bytes(), suffix


def run(*argv) -> int:
    return dataset.main(list(map(str, argv)))


def test_merge_gives_the_bytes_of_megatron_lm(tmp_path, pairs):
    out = tmp_path / "out"
    assert run("merge", "--input", *pairs, "--output-prefix", out / "all") == 0
    assert_equal(str(out / "all"), merged_by_megatron(pairs, tmp_path / "expected"))
    assert {path.name for path in out.iterdir()} == {"all.bin", "all.idx", "all.json"}


def test_merge_of_a_folder_is_sorted(tmp_path, pairs):
    folder = tmp_path / "folder"
    folder.mkdir()
    for prefix in pairs:
        for suffix in (".bin", ".idx"):
            shutil.copy(prefix + suffix, folder)
    assert run("merge", "--input", folder, "--output-prefix", tmp_path / "all.bin") == 0
    assert_equal(str(tmp_path / "all"), merged_by_megatron(sorted(pairs), tmp_path / "expected"))


def test_no_documents_are_merged_twice(tmp_path, pairs, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    for suffix in (".bin", ".idx"):
        shutil.copy(pairs[0] + suffix, folder / f"a{suffix}")
        shutil.copy(pairs[1] + suffix, folder / f"b{suffix}")
    out = ("--output-prefix", tmp_path / "all")
    assert run("merge", "--input", folder, folder / "b.idx", *out) == 1
    assert "b: is given more than once" in capsys.readouterr().err
    assert run("merge", "--input", folder, "--output-prefix", folder / "whole") == 0
    assert run("merge", "--input", folder, *out) == 1
    assert "whole: was merged from" in capsys.readouterr().err
    assert not (tmp_path / "all.bin").exists()


def test_a_pair_that_was_trained_on_is_no_folder(tmp_path, pairs):
    """Its cache lies in a folder of its name."""
    for suffix in (".bin", ".idx"):
        shutil.copy(pairs[0] + suffix, tmp_path / f"pair{suffix}")
    (tmp_path / "pair" / "cache").mkdir(parents=True)
    merging = ("merge", "--input", tmp_path / "pair", pairs[1], "--output-prefix", tmp_path / "all")
    assert run(*merging) == 0
    assert_equal(str(tmp_path / "all"), merged_by_megatron(pairs[:2], tmp_path / "expected"))


def test_mixed_dtypes(tmp_path, pairs, capsys):
    wide = write_sentences(tmp_path / "wide", 3, np.int32)
    merging = ("merge", "--input", pairs[0], wide, "--output-prefix", tmp_path / "all")
    assert run(*merging) == 1
    assert "holds uint16" in (error := capsys.readouterr().err) and "int32. Say by --dtype" in error
    assert run(*merging, "--dtype", "int32") == 0
    ours, *theirs = map(IndexedDataset, (str(tmp_path / "all"), pairs[0], wide))
    expected = [sequence for dataset in theirs for sequence in dataset]
    assert ours.index.dtype == np.int32 and len(ours) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(ours, expected, strict=True))
    (tmp_path / "all.bin").unlink()
    assert run(*merging, "--dtype", "uint8") == 1
    assert "which uint8 cannot hold. Give a larger --dtype" in capsys.readouterr().err
    assert not list(tmp_path.glob("all.*partial")) and not (tmp_path / "all.bin").exists()


@pytest.mark.parametrize("shares", ["1,1", "0.5,0.3,0.2", "70,15,15"])
def test_the_parts_of_a_split_make_the_whole(tmp_path, pairs, shares):
    whole = merged_by_megatron(pairs, tmp_path / "whole")
    parts = [tmp_path / f"part{i}" for i in range(len(shares.split(",")))]
    assert run("split", f"{whole}.idx", "--shares", shares, "--outputs", *parts) == 0
    assert run("verify", *parts) == 0
    assert run("merge", "--input", *parts, "--output-prefix", tmp_path / "again") == 0
    assert_equal(str(tmp_path / "again"), whole)


def test_split_after_a_number_of_documents(tmp_path, pairs):
    one, other = tmp_path / "one", tmp_path / "other"
    assert run("split", pairs[1], "--documents", 5, "--outputs", one, other) == 0
    assert [len(IndexedDataset(str(p)).document_indices) - 1 for p in (one, other)] == [5, 22]


@pytest.fixture
def made(tmp_path):
    """The golden documents by our tool, with a manifest."""
    from tests.data.preprocess.test_resume import PAIR
    from tests.data.preprocess.test_resume import run as preprocess

    folder = tmp_path / "made"
    assert preprocess(folder) == 0
    return str(folder / PAIR)


def test_manifests_follow(tmp_path, made):
    manifest = json.loads(Path(f"{made}.json").read_text())
    parts = [tmp_path / "one", tmp_path / "other"]
    assert run("split", made, "--shares", "2,1", "--outputs", *parts) == 0
    ones, others = (json.loads(Path(f"{part}.json").read_text()) for part in parts)
    assert ones["tokenizer"] == others["tokenizer"] == manifest["tokenizer"]
    assert others["split_from"] == {"path": made, "documents": [203, 305]}
    for name in ("documents", "sequences", "tokens"):
        assert ones[name] + others[name] == manifest[name]
    assert run("merge", "--input", *parts, "--output-prefix", tmp_path / "all") == 0
    merged = json.loads((tmp_path / "all.json").read_text())
    assert merged["tokenizer"] == manifest["tokenizer"] and merged["append_eod"] is True
    assert [part["documents"] for part in merged["merged_from"]] == [203, 102]


def test_different_tokenizers_are_not_merged(tmp_path, made, capsys):
    other = tmp_path / "other"
    for suffix in (".bin", ".idx"):
        shutil.copy(made + suffix, f"{other}{suffix}")
    manifest = json.loads(Path(f"{made}.json").read_text())
    manifest["tokenizer"]["hash"] = "0" * 64
    Path(f"{other}.json").write_text(json.dumps(manifest))
    assert run("merge", "--input", made, other, "--output-prefix", tmp_path / "all") == 1
    assert "different tokenizers" in capsys.readouterr().err
    Path(f"{other}.json").unlink()
    assert run("merge", "--input", made, other, "--output-prefix", tmp_path / "all") == 0
    assert "tokenizer" not in json.loads((tmp_path / "all.json").read_text())


def test_documents_made_otherwise_are_told(tmp_path, made, capsys):
    other = tmp_path / "other"
    for suffix in (".bin", ".idx"):
        shutil.copy(made + suffix, f"{other}{suffix}")
    manifest = json.loads(Path(f"{made}.json").read_text())
    Path(f"{other}.json").write_text(json.dumps({**manifest, "append_eod": False}))
    assert run("merge", "--input", other, made, "--output-prefix", tmp_path / "all") == 0
    assert f"{made} was made with --append-eod and {other} without" in capsys.readouterr().err
    Path(f"{other}.json").write_text(json.dumps(manifest))
    assert run("merge", "--input", other, made, "--output-prefix", tmp_path / "alike") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_vocabulary_size_wins_and_another_tokenizer_is_told(made, capsys):
    assert run("verify", made, "--vocab-size", 4096, *TOKENIZER) == 0
    assert capsys.readouterr().err == ""
    assert run("verify", made, "--vocab-size", 300, *TOKENIZER) == 1
    assert "ids must be from 0 to 299" in capsys.readouterr().err
    for command in (["stats"], ["verify", "--vocab-size", 4096]):
        assert run(*command, made, "--tokenizer-type", "ByteLevelTokenizer") == 0
        assert "was made with another tokenizer" in capsys.readouterr().err


def test_inspect(made, capsys):
    assert run("inspect", f"{made}.bin", "--first", 1, *TOKENIZER) == 0
    shown = capsys.readouterr().out
    assert "305 documents, 12,791 tokens (uint16)" in shown
    text = json.loads((GOLDEN / "docs.jsonl").read_text().splitlines()[1])["text"]
    assert repr(text[:40])[:-1] in shown
    assert "crc32 05b2ea1e" in shown and "warning" not in shown
    assert run("inspect", made, "--tokenizer-type", "ByteLevelTokenizer") == 0
    assert "warning: the tokenizer given here is another one" in capsys.readouterr().out
    assert run("inspect", GOLDEN / "mlm_text_document") == 0
    assert "no manifest" in capsys.readouterr().out


def test_stats(tmp_path, capsys):
    documents = [[5] * 3, [], [5, 9], [7] * 10]
    pair = write_dataset(tmp_path / "data", documents)
    assert run("stats", pair, "--vocab-size", 12, "--top", 2) == 0
    shown = capsys.readouterr().out
    assert "mean 3.8, longest 10; 1% 0 10% 0 50% 2 90% 10 99% 10" in shown
    assert "documents without tokens: 1" in shown and "never occur: 9 of 12" in shown
    assert shown.splitlines()[-2:] == ["  token        7:  66.667%", "  token        5:  26.667%"]


def test_stats_against_numpy(pairs):
    found = contents.statistics(pairs[0])
    tokens = np.fromfile(f"{pairs[0]}.bin", np.uint16)
    assert np.array_equal(found.token_counts, np.bincount(tokens))
    data = IndexedDataset(pairs[0])
    bounds = data.document_indices
    lengths = [data.sequence_lengths[a:b].sum() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert found.longest == max(lengths)
    assert found.length_counts[: max(lengths) + 1].tolist() == np.bincount(lengths).tolist()
    for share in (0.1, 0.5, 0.9):
        expected = np.quantile(lengths, share, method="inverted_cdf")
        assert found.length_quantile(share) == expected


def test_verify_names_the_first_bad_id(tmp_path, pairs, capsys):
    assert run("verify", *pairs, "--vocab-size", 1000) == 0
    assert "token ids from" in capsys.readouterr().out
    data = IndexedDataset(pairs[0])
    bounds = data.document_indices.tolist()
    # The first sequence of a document that has some, behind one that has none.
    document = next(d for d in range(5, 20) if bounds[d - 1] == bounds[d] < bounds[d + 1])
    sequence = bounds[document]
    position = int(data.sequence_lengths[:sequence].sum())
    with open(f"{pairs[0]}.bin", "r+b") as stream:
        stream.seek(2 * position)
        stream.write(struct.pack("<H", 1000))
    assert run("verify", pairs[0], "--vocab-size", 1000) == 1
    error = capsys.readouterr().err
    assert f"token {position} is 1000, in sequence {sequence} of document {document};" in error
    assert "from 0 to 999" in error


def test_verify_takes_the_vocabulary_of_the_manifest(made, capsys):
    assert run("verify", made) == 0
    assert "below 4,096" in capsys.readouterr().out
    with open(f"{made}.bin", "r+b") as stream:
        stream.write(struct.pack("<H", 4096))
    assert run("verify", made) == 1
    assert "token 0 is 4096" in capsys.readouterr().err


def test_verify_holds_the_files_to_the_manifest(made, tmp_path, capsys):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{GOLDEN / 'mlm_noeod_text_document'}{suffix}", made + suffix)
    assert run("verify", made) == 1
    assert "its manifest says tokens 12791, but the files hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["merge", "--input", "a", "absent", "--output-prefix", "out"],
            "absent.idx: cannot be read",
        ),
        (["merge", "--input", "a", "b", "--output-prefix", "./a"], "both read and written"),
        (["merge", "--input", "empty", "--output-prefix", "out"], "holds no .idx files"),
        (["split", "a", "--shares", "1,x", "--outputs", "p", "q"], "--shares 1,x: give numbers"),
        (["split", "a", "--shares", "1", "--outputs", "p", "q"], "1 numbers for 2 outputs"),
        (["split", "a", "--shares", "1,0", "--outputs", "p", "q"], "each must be above 0"),
        (
            ["split", "a", "--shares", "nan,1", "--outputs", "p", "q"],
            "--shares nan,1.0: each must be",
        ),
        (
            ["split", "a", "--shares", "1e308,1e308", "--outputs", "p", "q"],
            "each must be above 0, and finite",
        ),
        (["merge", "--input", "a", "--output-prefix", "p/"], "is no name of a pair"),
        (["merge", "--input", "a", "--output-prefix", ""], "is no name of a pair"),
        (["inspect", "a", "--first", "99999"], "--first 99999: a has documents 0 to 19"),
        (["split", "a", "--shares", "1,1", "--outputs", "p", "./p"], "written twice"),
        (["split", "a", "--shares", "1,9999", "--outputs", "p", "q"], "p: would hold no text"),
        (["split", "a", "--documents", "20", "--outputs", "p", "q"], "below the 20 documents"),
        (["split", "a", "--documents", "2", "--outputs", "p"], "makes 2 parts, not 1"),
        (["inspect", "a", "--tokenizer-model", "x"], "needs --tokenizer-type"),
        (["verify", "a", "--tokenizer-type", "GPT2"], "--tokenizer-type GPT2: unknown"),
    ],
)
def test_a_mistake_is_named_and_nothing_written(
    tmp_path, monkeypatch, pairs, capsys, argv, message
):
    (tmp_path / "empty").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 1
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_failure_on_the_way_leaves_the_older_output(tmp_path, monkeypatch, pairs, capsys):
    shutil.copy(f"{pairs[0]}.bin", tmp_path / "all.bin")
    shutil.copy(f"{pairs[0]}.idx", tmp_path / "all.idx")
    merging = ("merge", "--input", *pairs, "--output-prefix", tmp_path / "all")
    with monkeypatch.context() as patch:
        patch.setattr(PairWriter, "finish", lambda self: os.write(-1, b"not possible"))
        assert run(*merging) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert_equal(str(tmp_path / "all"), pairs[0])
    with OutputLock(str(tmp_path / "all")):
        assert run(*merging) == 1
    assert "is writing this output" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.partial"))
    assert run(*merging) == 0
    assert_equal(str(tmp_path / "all"), merged_by_megatron(pairs, tmp_path / "expected"))


def test_merge_needs_no_memory_for_its_files(tmp_path):
    from tests.memory_growth import growth

    whole = str(tmp_path / "large")
    writer = PairWriter(whole, np.uint16)
    tokens = np.zeros(5_000_000, np.uint16)
    for _ in range(6):
        writer.add(tokens, np.full(50_000, 100))
    writer.finish()
    writer.publish(None)
    streaming.CHUNK = 1 << 20
    merge.merge([whole], str(tmp_path / "warm"))
    # 120 MB of ids; the indices are mapped and count as memory while they are read.
    index_bytes = 3 * (tmp_path / "large.idx").stat().st_size
    again = str(tmp_path / "again")
    for suffix in (".bin", ".idx"):
        os.link(whole + suffix, again + suffix)
    assert growth(lambda: merge.merge([whole, again], str(tmp_path / "all"))) < 25e6 + index_bytes


def test_as_a_script():
    command = [sys.executable, "tools/dataset.py", "verify", str(GOLDEN / "mlm_text_document")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "sound" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "merge", "split", "stats"])
def test_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        run(command, "--help")
    assert f"{command} [-h]" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--documents", "--first", "--vocab-size"])
@pytest.mark.parametrize("value", ["-1", "1.5", "nan", str(10**30), "9" * 5000])
def test_counts_that_are_none(pairs, capsys, flag, value):
    with pytest.raises(SystemExit):
        run("inspect", pairs[0], f"{flag}={value}")
    error = capsys.readouterr().err
    assert f"argument {flag}: '" in error and "must be a whole number" in error
    assert len(error) < 1000
