"""SIGKILL at random moments of a preprocessing: what goes on writes what one run would have."""

import gzip
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.json
import pyarrow.parquet
import zstandard

from tests.data.preprocess.test_resume import DOCS, PAIR, ROOT, TOKENIZER, run
from tests.soak.rounds import rounds

KILLS = rounds(60)
SECONDS = 0.2
"""Of work in which a kill comes: less than a run needs, so that some are killed several times."""
_SCRIPT = """
import os, sys, time
from megatron_memory.data.preprocess import outputs, parquet, sources
from tools import preprocess_data

sources._BLOCK_BYTES = parquet._BLOCK_BYTES = 500
outputs._SECONDS_BETWEEN_RECORDS = 0.01
# As slow as a disk, wherever the files lie: kills come before, in and after each.
os.fsync = lambda descriptor: time.sleep(0.001)
print("begins", flush=True)
sys.exit(preprocess_data.main(sys.argv[1:]))
"""


def _inputs(folder: Path) -> list[Path]:
    """The golden documents in a file of each kind."""
    folder.mkdir()
    lines = DOCS.read_bytes().splitlines(keepends=True)
    (folder / "a.jsonl").write_bytes(b"".join(lines[:80]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[80:160])))
    rest = b"".join(lines[160:230])
    (folder / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rest))
    table = pyarrow.json.read_json(pyarrow.BufferReader(b"".join(lines[230:])))
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=20)
    return sorted(folder.iterdir())


def _start(output: Path, inputs: list[Path], workers: int) -> subprocess.Popen:
    argv = ["--input", *map(str, inputs), "--output-prefix", str(output / "mlm"), *TOKENIZER]
    argv += ["--append-eod", "--resume", "--workers", str(workers)]
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *argv],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    return process


def _await_moment(process: subprocess.Popen, output: Path, choose: random.Random) -> None:
    """Any; two of three times after a record, however slow the machine."""
    journal = output / f"{PAIR}.journal"
    before = journal.stat().st_size if journal.exists() else 0
    wants_record = choose.random() < 0.67
    while wants_record and process.poll() is None:
        if journal.exists() and journal.stat().st_size > before + 1000:
            break
        time.sleep(0.005)
    time.sleep(choose.uniform(0, SECONDS))


def _kill(process: subprocess.Popen, choose: random.Random) -> None:
    """The process with all its workers, or without them, or one worker alone."""
    target = choose.choice(("all", "parent", "worker"))
    workers = psutil.Process(process.pid).children()
    if target == "all":
        os.killpg(process.pid, signal.SIGKILL)
    elif target == "worker" and workers:
        choose.choice(workers).kill()
    else:
        process.kill()


def test_nothing_is_lost_or_written_twice(tmp_path: Path):
    inputs, output = _inputs(tmp_path / "inputs"), tmp_path / "output"
    output.mkdir()
    (tmp_path / "expected").mkdir()
    assert run(tmp_path / "expected", inputs=inputs) == 0
    expected = _files(tmp_path / "expected")
    choose, kills, resumed, completed = random.Random(6), 0, 0, 0
    while (few := _are_few(kills, resumed)) or not completed:
        process = _start(output, inputs, choose.choice((1, 2, 3)))
        if few:
            _await_moment(process, output, choose)
        if few and process.poll() is None:
            _kill(process, choose)
            kills += 1
        _, errors = process.communicate(timeout=60)
        assert "Traceback" not in errors, errors
        resumed += "--resume: going on after" in errors
        if process.returncode == 0:
            assert _files(output) == expected
            completed += 1
            for file in output.iterdir():
                file.unlink()
        else:
            killed = process.returncode == -signal.SIGKILL
            assert killed or "was killed by SIGKILL" in errors, errors
    print(f"{kills} kills, {resumed} went on, {completed} times complete")
    assert resumed >= KILLS // 3, "hardly any run had something to go on from"


def _are_few(kills: int, resumed: int) -> bool:
    """Whether more kills are wanted: on a slow machine they may all come before there is something
    to go on from."""
    return kills < KILLS or (resumed < KILLS // 3 and kills < 5 * KILLS)


def _files(folder: Path) -> dict[str, bytes]:
    """By name; the pair and its manifest, and nothing else."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found.keys() == {f"{PAIR}.{suffix}" for suffix in ("bin", "idx", "json")}
    return found
