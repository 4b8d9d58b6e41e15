"""A disk that is full or fails: said in so many words, tried again, and old checkpoints stay."""

import contextlib
import errno
import inspect
import os
import resource
import shutil
import signal
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
from megatron_memory.training.checkpoint.lease import Lease
from megatron_memory.training.checkpoint.writer_processes import write_in_processes
from tests.distributed import run_ranks
from tests.lines import COMMON_FILES
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


def _killed_writer(times: list[int]):
    """As the kernel does where memory is short: no word of the process that writes."""
    original = FileSystemWriterAsync.write_preloaded_data

    def write(*args, write_bucket, **kwargs):
        if torch.distributed.get_rank() == 1 and _is_at(write_bucket[0], times):
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args, write_bucket=write_bucket, **kwargs)

    write.keeps_causes = True
    return _replaced(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write))


def _lost_folder(at: int):
    """A file system that answers nothing on rank 0, while a checkpoint is written."""
    original, reading = folders.begin, folders.read_bounded

    def begin(root, iteration, run=None):
        if iteration == at:
            folders.read_bounded = _stale
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(root))
        folders.read_bounded = reading
        return original(root, iteration, run)

    return _replaced(folders, "begin", begin)


def _stale(*args):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def _unreadable_lease(at: list[int]):
    original, calls = Lease.require, [0]

    def require(self):
        calls[0] += 1
        if calls[0] in at:
            _stale()
        original(self)

    return _replaced(Lease, "require", require)


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
    """Rank 0 may only write small files, which plain values in a file of their own are too large
    for."""
    original, limits = dist_checkpointing.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(state, folder, *args, **kwargs):
        if torch.distributed.get_rank() == 0 and _is_at(folder, times):
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
        try:
            return original(state, folder, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return _replaced(dist_checkpointing, "save", save)


def _deleted_folder(iteration: int):
    """Somebody deletes --save with all that is in it, while rank 0 is about to write there."""
    original = dist_checkpointing.save

    def save(state, folder, *args, **kwargs):
        if torch.distributed.get_rank() == 0 and _is_at(folder, [iteration]):
            shutil.rmtree(Path(folder).parent)
        torch.distributed.barrier()
        return original(state, folder, *args, **kwargs)

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
        **{name: story("common", _limited_files([4])) for name in COMMON_FILES},
        "metadata": story("meta", _raises(FileSystemWriterAsync, "finish", errno.EDQUOT, [4])),
        "format": story("format", _raises(serialization, "save_config", errno.EROFS, [4])),
        "killed": story("killed", _killed_writer([4])),
        "killed async": story("killed_async", _killed_writer([4]), async_save=True),
        "lost": story("lost", _lost_folder(4)),
        "deleted": story("deleted", _deleted_folder(4)),
        # Three times a save: before its folder, for what rank 0 wrote, and before its name.
        "lease": story("lease", _unreadable_lease([4])),
        "pending": story("pending", _not_a_number_at(3), async_save=True),
    }


LEFT = ["config.yaml", folders.TRACKER]


def test_failed_saves_are_said_tried_again_and_end_the_run_at_last(dataset: str, tmp_path: Path):
    config = tiny_config(dataset, checkpoint={"save": "-", "save_interval": 2})
    config = change(config, "training", train_iters=8)
    first, second = run_ranks(_stories, 2, config, str(tmp_path))
    assert first == second
    listed = ("sync", "async", *COMMON_FILES, "metadata", "format", "killed", "killed async")
    for name in (*listed, "lost", "lease"):
        error, failures, saved, others = first[name]
        assert error == "" and others == LEFT, (name, error, others)
        assert saved == [2, 6, 8], name
        (said,) = failures
        assert (
            f"{tmp_path}" in said and "the checkpoint of iteration 4 could not be written" in said
        )
        newest = "which is the newest cannot be read" if name == "lost" else "the newest is iter"
        assert f"of complete checkpoints {newest}" in said
        assert said.endswith("the next save is retry 1 of 3 (--save-retries)")
    error, failures, saved, others = first["deleted"]
    assert (error, len(failures), saved, others) == ("", 1, [6, 8], LEFT)
    assert "of complete checkpoints there is none yet" in failures[0]
    for name in ("sync", "async"):
        said = first[name][1][0]
        assert "rank 1: " in said and "[Errno 28] No space left on device" in said
        assert "There is no space left" in said
    for name in ("killed", "killed async"):
        assert "was ended by signal 9. No disk says so" in first[name][1][0]
    for name in ("lost", "lease"):
        assert "The network file system has lost the folder" in first[name][1][0]
    for name in COMMON_FILES:
        assert "Files may not be that large there" in first[name][1][0]
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
    assert getattr(FileSystemWriterAsync, writer_errors.checkpoints.WRITERS) is write_in_processes
    taken = inspect.signature(FileSystemWriterAsync.write_preloaded_data.__wrapped__).parameters
    assert list(taken)[:6] == [
        "transform_list",
        "local_proc_idx",
        "write_bucket",
        "results_queue",
        "count_queue",
        "use_fsync",
    ]
    assert FileSystemWriterAsync.finish.keeps_errors and serialization.save_config.keeps_errors
