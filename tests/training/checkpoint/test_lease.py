"""One writer: living ones are left alone, dead ones are replaced, whatever their clocks say."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_memory.exceptions import CheckpointError
from megatron_memory.runtime import processes
from megatron_memory.training.checkpoint import folders, lease
from megatron_memory.training.checkpoint.lease import LEASE_FILE, Lease


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(lease, "_SECONDS_UNTIL_DEAD", 0.6)


def _hold(root: Path, **changes: object) -> Path:
    """What another process would write."""
    other = dataclasses.asdict(lease._this_process()) | {"run": "other"} | changes
    (root / LEASE_FILE).write_text(json.dumps(other))
    return root / LEASE_FILE


@pytest.fixture
def process():
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield running
    running.kill()
    running.wait()


def test_living_process_keeps_it_however_long_it_is_silent(tmp_path: Path, process):
    file = _hold(tmp_path, pid=process.pid, started=processes.started(process.pid))
    os.utime(file, (0, 0))
    with pytest.raises(CheckpointError, match=f"another run writes there .run other.*{LEASE_FILE}"):
        Lease(tmp_path)
    assert json.loads(file.read_text())["run"] == "other"


def test_dead_process_and_a_number_used_again(tmp_path: Path, process):
    living = process.pid, processes.started(process.pid)
    process.kill()
    # Not waited for: a zombie writes nothing.
    deadline = time.monotonic() + 10
    while processes.started(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid, started in (living, (os.getppid(), "1"), (2**22 + 5, "1"), (2**22 + 5, "")):
        _hold(tmp_path, pid=pid, started=started)
        ours = Lease(tmp_path)
        ours.require()
        ours.release()
        assert list(tmp_path.iterdir()) == []


def test_another_machines_heartbeat_decides_by_the_file_systems_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = _hold(tmp_path, machine="elsewhere", host="node-b", pid=1)
    said: list[str] = []
    beating, stop = time.time() + 3600, threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.1):
            number += 1
            # An hour ahead: only that it moves counts.
            os.utime(file, (beating + number, beating + number))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(CheckpointError, match="run other, process 1 on node-b"):
            Lease(tmp_path, said.append)
    finally:
        stop.set()
        heart.join()
    assert len(said) == 1 and "waiting for a sign of life of run other" in said[0]
    # This machine's clock is a year off; the files' clock is not.
    os.utime(file, (time.time() - 10, time.time() - 10))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 365 * 86400)
    began = time.monotonic()
    Lease(tmp_path, said.append).release()
    assert time.monotonic() - began < 0.5 and len(said) == 1


def test_silent_owner_elsewhere_is_waited_for_and_replaced(tmp_path: Path):
    _hold(tmp_path, machine="elsewhere")
    said: list[str] = []
    ours = Lease(tmp_path, said.append)
    assert len(said) == 1
    before = (tmp_path / LEASE_FILE).stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / LEASE_FILE).stat().st_mtime_ns > before
    ours.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"run": 3}', "9" * 5000, "[" * 5000])
def test_damaged_file_is_held_by_somebody_until_it_is_silent(content: str, tmp_path: Path):
    (tmp_path / LEASE_FILE).write_text(content)
    os.utime(tmp_path / LEASE_FILE, (0, 0))
    ours = Lease(tmp_path)
    ours.require()
    ours.release()


def test_lease_that_another_run_took_is_not_taken_back(tmp_path: Path):
    ours = Lease(tmp_path)
    file = _hold(tmp_path, pid=1)
    with pytest.raises(CheckpointError, match="run other, process 1 .* holds it now"):
        ours.require()
    # It gives no sign of life for the other, either.
    before = file.stat().st_mtime_ns
    time.sleep(0.2)
    assert file.stat().st_mtime_ns == before
    ours.release()
    assert file.exists()


@pytest.mark.parametrize("deleted", ["file", "folder"])
@pytest.mark.parametrize("saves", [0, 1])
def test_deleted_lease_is_taken_again(deleted: str, saves: int, tmp_path: Path):
    root, said = tmp_path / "save", []
    ours = Lease(root, said.append)
    if saves:
        folders.begin(root, 10)
        folders.publish(root, 10)
        ours.remember()
    if deleted == "folder":
        shutil.rmtree(root)
    else:
        (root / LEASE_FILE).unlink()
    ours.require()
    assert len(said) == 1 and f"{root / LEASE_FILE} was deleted" in said[0]
    ours.require()
    # Another process would find it held, and alive.
    before = (root / LEASE_FILE).stat().st_mtime_ns
    time.sleep(0.2)
    assert (root / LEASE_FILE).stat().st_mtime_ns > before
    assert json.loads((root / LEASE_FILE).read_text())["run"] == ours.run and len(said) == 1
    ours.release()
    assert not (root / LEASE_FILE).exists()


@pytest.mark.parametrize("same_iteration", [True, False])
def test_deleted_lease_is_not_taken_after_another_run_has_saved(
    same_iteration: bool, tmp_path: Path
):
    """That run came while this one was stopped, and has ended since."""
    folders.write_tracker(tmp_path, 10)
    ours = Lease(tmp_path)
    (tmp_path / LEASE_FILE).unlink()
    folders.write_tracker(tmp_path, 10 if same_iteration else 20)
    with pytest.raises(CheckpointError, match="another run has saved there since.*--load"):
        ours.require()
    assert not (tmp_path / LEASE_FILE).exists()
    ours.release()


def test_folder_of_another_file_system_is_not_written_to(tmp_path: Path):
    """A disk that is no longer mounted leaves the folder it was mounted on."""
    ours = Lease(tmp_path)
    ours._device += 1
    (tmp_path / LEASE_FILE).unlink()
    with pytest.raises(OSError, match="another file system was there"):
        ours.require()
    ours.release()
    assert list(tmp_path.iterdir()) == []


def test_of_many_that_find_a_dead_run_one_wins(tmp_path: Path):
    """Each is a process, for one process is one run."""
    _hold(tmp_path, pid=2**22 + 5)
    script = (
        "import sys, pathlib\n"
        "from megatron_memory.training.checkpoint.lease import Lease\n"
        "from megatron_memory.exceptions import CheckpointError\n"
        "sys.stdin.readline()\n"
        "try:\n"
        f"    held = Lease(pathlib.Path({str(tmp_path)!r})); print('won', flush=True)\n"
        "    sys.stdin.readline()\n"
        "except CheckpointError: print('lost', flush=True)\n"
    )
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        for starter in starters:
            starter.stdin.write("\n")
            starter.stdin.flush()
        answers = sorted(starter.stdout.readline().strip() for starter in starters)
    finally:
        for starter in starters:
            starter.kill()
            starter.communicate()
    assert answers == ["lost", "lost", "lost", "won"]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_a_pipe_or_a_link_to_nowhere_is_a_file_that_is_silent(make, tmp_path: Path):
    """It is not waited for without end."""
    make(tmp_path / LEASE_FILE)
    ours = Lease(tmp_path)
    ours.require()
    ours.release()
    assert list(tmp_path.iterdir()) == []
