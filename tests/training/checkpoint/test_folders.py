"""The order in which a checkpoint's names appear: at every moment the previous one can be found."""

import contextlib
import os
from pathlib import Path

import pytest

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import folders


def _write(root: Path, iteration: int, content: str = "whole") -> None:
    folder = folders.begin(root, iteration)
    (folder / "common.pt").write_text(content)
    folders.publish(root, iteration)


def _newest(root: Path) -> str:
    iteration = folders.read_tracker(root)
    assert iteration is not None
    return (folders.published_folder(root, iteration) / "common.pt").read_text()


def test_published_checkpoint_has_megatrons_names(tmp_path: Path):
    _write(tmp_path, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "iter_0000010",
        "latest_checkpointed_iteration.txt",
    ]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "10\n"


def test_nothing_is_there_before_the_first(tmp_path: Path):
    assert folders.read_tracker(tmp_path) is None
    assert folders.saved_iterations(tmp_path / "missing") == []


def test_incomplete_checkpoint_is_not_counted_and_its_leftovers_go(tmp_path: Path):
    (folders.begin(tmp_path, 20) / "left over").write_text("")
    assert folders.saved_iterations(tmp_path) == []
    assert list(folders.begin(tmp_path, 20).iterdir()) == []


class _Crash(Exception):
    pass


@pytest.mark.parametrize("iteration", [10, 20], ids=["same iteration again", "next"])
@pytest.mark.parametrize("operation", ["rename", "replace"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("count", [1, 2])
def test_crash_at_any_rename_leaves_a_whole_checkpoint(
    iteration: int, operation: str, moment: str, count: int, tmp_path: Path, monkeypatch
):
    _write(tmp_path, 10, "previous")
    folder = folders.begin(tmp_path, iteration)
    (folder / "common.pt").write_text("new")
    original, calls = getattr(os, operation), [0]

    def crash(*args):
        calls[0] += 1
        if calls[0] == count and moment == "before":
            raise _Crash
        original(*args)
        if calls[0] == count:
            raise _Crash

    monkeypatch.setattr(folders.os, operation, crash)
    with contextlib.suppress(_Crash):
        folders.publish(tmp_path, iteration)
    monkeypatch.undo()
    assert _newest(tmp_path) in ("previous", "new")
    is_complete = not folder.exists()
    assert folders.finish_publishing(tmp_path) in (None, iteration)
    assert _newest(tmp_path) == ("new" if is_complete else "previous")
    folders.remove_leftovers(tmp_path)
    _write(tmp_path, iteration, "again")
    assert _newest(tmp_path) == "again"
    assert folders.saved_iterations(tmp_path) == sorted({10, iteration})


def test_publication_is_not_finished_after_somebody_went_back(tmp_path: Path):
    for iteration in (10, 20):
        _write(tmp_path, iteration)
    interrupted = tmp_path / f".{folders.TRACKER}.77.tmp"
    for text, changed, expected in (("20\n", 0, None), ("2", 2**40, None), ("20\n", 2**40, 20)):
        folders.write_tracker(tmp_path, 10)
        interrupted.write_text(text)
        os.utime(interrupted, (changed, changed))
        assert folders.finish_publishing(tmp_path) == expected
        assert folders.read_tracker(tmp_path) == (expected or 10)


def test_prune_keeps_the_newest_and_those_of_a_longer_run(tmp_path: Path):
    for iteration in (10, 20, 30, 40, 100):
        _write(tmp_path, iteration)
    assert folders.prune(tmp_path, 2, newest=40) == [10, 20]
    assert folders.saved_iterations(tmp_path) == [30, 40, 100]
    assert folders.prune(tmp_path, 5, newest=40) == []


@pytest.mark.parametrize("text", ["", "release", "12.5", "-3"])
def test_tracker_without_a_number_is_refused(text: str, tmp_path: Path):
    _write(tmp_path, 30)
    (tmp_path / folders.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match="not an iteration.* 30"):
        folders.read_tracker(tmp_path)


def test_names_of_iterations():
    assert folders.iteration_folder(Path("a"), 12345678).name == "iter_12345678"
    assert folders.iteration_of(Path("a/iter_0000010")) == 10
    assert folders.iteration_of(Path("a/iter_0000010.replaced")) == 10
    assert folders.iteration_of(Path("a/iter_0000010.incomplete")) is None
    assert folders.iteration_of(Path("a/other")) is None
