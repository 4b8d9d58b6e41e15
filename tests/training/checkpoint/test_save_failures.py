"""A disk that is full or fails: said in so many words, tried again, and old checkpoints stay."""

import contextlib
import errno
import os
import resource
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_memory.config import Config
from megatron_memory.entry import EXIT_NOT_SAVED, run_entry
from megatron_memory.exceptions import SaveError, TrainingError
from megatron_memory.training import progress, step, trainer
from megatron_memory.training.checkpoint import folders, writer_errors
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, tiny_config


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object):
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _full_disk(times: list[int]):
    """The kernel's own answer, in the process that writes the second rank's tensors."""
    original = FileSystemWriterAsync.write_preloaded_data

    def write(*args, write_bucket, **kwargs):
        if torch.distributed.get_rank() == 1 and _is_at(write_bucket[0], times):
            write_bucket = ("/dev/full", *write_bucket[1:])
        original(*args, write_bucket=write_bucket, **kwargs)

    write.keeps_causes = True
    return _replaced(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write))


def _is_at(path: object, times: list[int]) -> bool:
    return any(f"iter_{iteration:07d}" in str(path) for iteration in times)


def _raises(owner: object, name: str, number: int, times: list[int]):
    """An error on rank 0, in a function of megatron-core that only rank 0 calls."""
    original = getattr(owner, name)

    def fail(*args, **kwargs):
        if torch.distributed.get_rank() == 0 and _is_at([*args, vars(args[0])], times):
            raise OSError(number, os.strerror(number), "somewhere")
        return original(*args, **kwargs)

    return _replaced(owner, name, writer_errors._kept_for_later(fail))


def _limited_files(times: list[int]):
    """Rank 0 may only write small files, which `common.pt` is too large for."""
    original, limits = dist_checkpointing.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(state, folder, *args, **kwargs):
        if torch.distributed.get_rank() == 0 and _is_at(folder, times):
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
        try:
            return original(state, folder, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return _replaced(dist_checkpointing, "save", save)


def _story(config: Config, fault) -> tuple[str, list[str], list[int], list[str]]:
    """The error, what was said of saves, the checkpoints and whatever else lies in --save."""
    said: list[str] = []
    root, error = Path(config.checkpoint.save), ""
    with _replaced(progress.Console, "say", lambda self, line: said.append(line)), fault:
        try:
            run(config)
        except (SaveError, TrainingError) as failed:
            error = f"{type(failed).__name__}: {failed}"
    failures = [line for line in said if "could not be written" in line]
    others = sorted(p.name for p in root.iterdir() if folders.iteration_of(p) is None)
    return error, failures, folders.saved_iterations(root), others


def _not_a_number_at(iteration: int):
    """On all ranks alike, as `training/bad_steps.py` raises it."""
    original, steps = step.train_step, [0]

    def train_step(*args, **kwargs):
        steps[0] += 1
        if steps[0] == iteration:
            raise TrainingError(f"iteration {iteration}: the loss is nan")
        return original(*args, **kwargs)

    return _replaced(trainer, "train_step", train_step)


def _stories(config: Config, root: str) -> dict[str, tuple]:
    def story(name: str, fault, **checkpoint):
        own = change(config, "checkpoint", save=f"{root}/{name}", **checkpoint)
        return _story(own, fault)

    # So that the faults come where the errors of a disk do, behind what keeps them.
    writer_errors.install()
    return {
        "sync": story("sync", _full_disk([4])),
        "async": story("async", _full_disk([4]), async_save=True),
        "no retry": story("no", _full_disk([4]), async_save=True, save_retries=0),
        "retries used up": story("used", _full_disk([4, 6]), save_retries=1),
        "the last": story("last", _full_disk([8])),
        "common": story("common", _limited_files([4])),
        "metadata": story("meta", _raises(FileSystemWriterAsync, "finish", errno.EDQUOT, [4])),
        "format": story("format", _raises(serialization, "save_config", errno.EROFS, [4])),
        "pending": story("pending", _not_a_number_at(3), async_save=True),
    }


LEFT = ["config.yaml", folders.TRACKER]


def test_failed_saves_are_said_tried_again_and_end_the_run_at_last(dataset: str, tmp_path: Path):
    config = tiny_config(dataset, checkpoint={"save": "-", "save_interval": 2})
    config = change(config, "training", train_iters=8)
    first, second = run_ranks(_stories, 2, config, str(tmp_path))
    assert first == second
    for name in ("sync", "async", "common", "metadata", "format"):
        error, failures, saved, others = first[name]
        assert error == "" and others == LEFT, (name, error, others)
        assert saved == [2, 6, 8], name
        (said,) = failures
        assert (
            f"{tmp_path}" in said and "the checkpoint of iteration 4 could not be written" in said
        )
        assert "of complete checkpoints the newest is iteration 2" in said
        assert said.endswith("the next save is retry 1 of 3 (--save-retries)")
    for name in ("sync", "async"):
        said = first[name][1][0]
        assert "rank 1: " in said and "[Errno 28] No space left on device" in said
        assert "There is no space left" in said
    assert "Files may not be that large there" in first["common"][1][0]
    assert "The quota is used up" in first["metadata"][1][0]
    assert "The file system can only be read" in first["format"][1][0]

    error, failures, saved, others = first["no retry"]
    assert error.startswith("SaveError: ") and "--save-retries is 0: the training ends" in error
    assert (failures, saved, others) == ([], [2], LEFT)
    error, failures, saved, others = first["retries used up"]
    assert error.startswith("SaveError: ") and "failed save 2 in a row" in error
    assert len(failures) == 1 and (saved, others) == ([2], LEFT)
    error, failures, saved, others = first["the last"]
    assert error.startswith("SaveError: ") and "has ended, without that checkpoint" in error
    # When the interval is due, and at the end.
    assert len(failures) == 2 and (saved, others) == ([2, 4, 6], LEFT)
    error, failures, saved, others = first["pending"]
    assert error.startswith("TrainingError: iteration 3: the loss is nan")
    assert (failures, saved, others) == ([], [2], LEFT)


def test_exit_code_of_its_own(capsys: pytest.CaptureFixture):
    def fail() -> int:
        raise SaveError("nothing is saved")

    assert run_entry(fail) == EXIT_NOT_SAVED == 3
    assert capsys.readouterr().err == "SaveError: nothing is saved\n"


def test_megatron_cores_writer_has_what_is_fitted():
    writer_errors.install()
    assert FileSystemWriterAsync.write_preloaded_data.keeps_causes
    assert FileSystemWriterAsync.finish.keeps_errors and serialization.save_config.keeps_errors
