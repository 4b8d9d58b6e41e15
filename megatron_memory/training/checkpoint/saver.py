"""Writing checkpoints, in the foreground or behind the training."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint import CheckpointException

from megatron_memory.config import save_config
from megatron_memory.config.pools import with_share_groups
from megatron_memory.exceptions import CheckpointError, SaveError
from megatron_memory.training.checkpoint import folders, state, writer_errors
from megatron_memory.training.checkpoint.agreement import ask_first_rank
from megatron_memory.training.checkpoint.checksums import MARK
from megatron_memory.training.checkpoint.checksums_together import join_sums, with_sums
from megatron_memory.training.checkpoint.integrity import check_whole
from megatron_memory.training.checkpoint.lease import Lease
from megatron_memory.training.checkpoint.state import Position
from megatron_memory.training.checkpoint.writer_queue import start_writer_queue
from megatron_memory.training.setup import TrainingSetup, data_parallel_group
from megatron_memory.upstream import fitting

checkpoints = fitting("checkpoints")

_FILES_A_RANK = 2
"""Each written by a process of its own."""

T = TypeVar("T")


class _NotWritten(Exception):
    """A save that failed, on all ranks alike."""


class CheckpointSaver:
    """Writes a run's checkpoints to `--save`. Every method is a collective call.

    A save that fails is said, and tried again at the next interval, `--save-retries` times in a
    row; the checkpoints before it stay.

    Args:
        setup: of this rank; `--save` must be given.
        vocab_size: tokens before padding, which belong to the model's identity.
        lease: on rank 0, of `--save`; None: the caller is sure to be alone.
        say: told of every save that fails.
        carried: plain values of the checkpoint that the run began with, which stay as they are.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        vocab_size: int,
        lease: Lease | None = None,
        say: Callable[[str], None] = print,
        carried: Mapping[str, Any] | None = None,
    ):
        assert setup.config.checkpoint.save is not None, "there is nowhere to save to"
        self._setup = setup
        self._config = with_share_groups(setup.config)
        self._vocab_size = vocab_size
        self._root = Path(setup.config.checkpoint.save)
        self._lease, self._say = lease, say
        self._carried = dict(carried or {})
        self._run = None if lease is None else lease.run
        self._strategy = _strategy()
        self._running = AsyncCallsQueue()
        self._writing: Position | None = None
        self._num_failures = 0
        self._problem = ""
        self.newest: Position | None = None
        """Of the newest checkpoint that is complete."""
        self.keep_before: int | None = None
        """Iteration before which no checkpoint is deleted at present; None: `--keep-last` alone
        decides."""
        writer_errors.install()
        start_writer_queue()
        ask_first_rank(self._begin)

    def _begin(self) -> None:
        save_config(self._config, self._root / folders.CONFIG_FILE)
        if self._lease is not None:
            self._lease.remember()

    def save(self, position: Position, more: Mapping[str, Any] | None = None) -> Path | None:
        """Write a checkpoint; with `--async-save` it is complete only after a later `poll`.

        Args:
            position: how far the training is.
            more: further plain values, for the loader to find in `Found.common`.

        Returns:
            the folder that it has, or will have; None where it failed, for the first times.

        Raises:
            SaveError: it, or the one before it, could not be written, and no retry is left.
            CheckpointError: another run writes there now.
        """
        self.finish()
        if not self._tried(lambda: self._write(position, dict(more or {}))):
            return None
        return folders.iteration_folder(self._root, position.iteration)

    def poll(self) -> None:
        """Complete what is written by now; cheap where nothing is.

        Raises:
            SaveError, CheckpointError: as `save`.
        """
        self._tried(lambda: self._running.maybe_finalize_async_calls(blocking=False))

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            SaveError, CheckpointError: as `save`.
        """
        self._tried(lambda: self._running.maybe_finalize_async_calls(blocking=True))

    def close(self) -> None:
        """`finish`, for the last time.

        Raises:
            SaveError: the last save failed, and there is no interval left in which to retry.
            CheckpointError: as `save`.
        """
        self.finish()
        if self._num_failures:
            raise SaveError(f"{self._problem}. The training has ended, without that checkpoint")

    def _tried(self, write: Callable[[], object]) -> bool:
        try:
            write()
            return True
        except _NotWritten as failed:
            found = str(failed)
        except CheckpointException as failed:
            found = "; ".join(f"rank {rank}: {error[0]}" for rank, error in failed.failures.items())
        # Only rank 0 is told by megatron-core what other ranks' writers met.
        self._count_failure(ask_first_rank(lambda: self._describe(found)))
        return False

    def _describe(self, found: str) -> str:
        """The failure for the user; the partial checkpoint makes room."""
        assert self._writing is not None, "nothing was being written"
        partial = folders.incomplete_folder(self._root, self._writing.iteration, self._run)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            kept = folders.read_tracker(self._root)
            newest = "there is none yet" if kept is None else f"the newest is iteration {kept}"
        except CheckpointError:
            # The disk that fails has this file, too. It is no reason to end the training.
            newest = f"which is the newest cannot be read ({folders.TRACKER})"
        return (
            f"--save {self._root}: the checkpoint of iteration {self._writing.iteration} could not "
            f"be written: {found}. {writer_errors.meaning(found)}. What was written of it is "
            f"deleted; of complete checkpoints {newest}"
        )

    def _count_failure(self, problem: str) -> None:
        self._num_failures, self._problem = self._num_failures + 1, problem
        retries = self._setup.config.checkpoint.save_retries
        if self._num_failures > retries:
            raise SaveError(
                f"{problem}. It was failed save {self._num_failures} in a row, and --save-retries "
                f"is {retries}: the training ends"
            )
        self._say(
            f"{problem}. The training goes on; the next save is retry {self._num_failures} of "
            f"{retries} (--save-retries)"
        )

    def _write(self, position: Position, more: state.StateDict) -> None:
        self._writing = position
        writer_errors.forget()
        folder = self._first_rank_writes(
            lambda: folders.begin(self._root, position.iteration, self._run)
        )
        request = checkpoints.save(
            self._state(position) | more,
            folder,
            self._strategy,
            state.content_metadata(self._setup.config),
            _without_empty,
        )
        self._first_rank_writes(writer_errors.raise_kept)
        if self._has_sums:
            request = with_sums(request, self._setup.config.checkpoint.checksums)
        request.add_finalize_fn(lambda: self._publish(position))
        if self._setup.config.checkpoint.async_save:
            self._running.schedule_async_request(request)
        else:
            request.execute_sync()

    @property
    def _has_sums(self) -> bool:
        return self._setup.config.checkpoint.checksums != "none"

    def _state(self, position: Position) -> state.StateDict:
        setup, checkpoint = self._setup, self._setup.config.checkpoint
        model = state.sharded_model(setup.model)
        saved: state.StateDict = {
            **self._carried,
            **model,
            **state.sharded_usage(setup),
            "iteration": position.iteration,
            "consumed_samples": position.consumed_samples,
            "vocab_size": self._vocab_size,
            "layout": state.layout(setup.config),
            "device": setup.backend.device.type,
            "has_generators": not checkpoint.no_save_rng,
            MARK: self._has_sums,
        }
        if not checkpoint.no_save_optim:
            saved |= state.sharded_optimizer(setup, model, is_loading=False)
            saved["opt_param_scheduler"] = setup.scheduler.state_dict()
        if not checkpoint.no_save_rng:
            saved |= state.sharded_generators(setup)
        return saved

    def _first_rank_writes(self, function: Callable[[], T]) -> T:
        """What rank 0 alone does, with an error on every rank.

        Raises:
            _NotWritten: the disk.
            CheckpointError: another run writes there now.
        """

        def attempt() -> tuple[T | None, str | None]:
            try:
                if self._lease is not None:
                    self._lease.require()
            except OSError as error:
                return None, str(error)
            try:
                return function(), None
            except (CheckpointError, OSError) as error:
                return None, str(error)

        result, problem = ask_first_rank(attempt)
        if problem is not None:
            raise _NotWritten(problem)
        return result  # type: ignore[return-value]

    def _publish(self, position: Position) -> None:
        self._first_rank_writes(lambda: self._publish_on_first_rank(position.iteration))
        self.newest, self._num_failures = position, 0
        keep_last = self._setup.config.checkpoint.keep_last
        if keep_last is not None:
            self._prune(position.iteration, keep_last)

    def _publish_on_first_rank(self, iteration: int) -> None:
        writer_errors.raise_kept()
        folder = folders.incomplete_folder(self._root, iteration, self._run)
        save_config(self._config, folder / folders.CONFIG_FILE)
        check_whole(folder)
        if self._has_sums:
            join_sums(folder, self._setup.config.checkpoint.checksums)
        folders.publish(self._root, iteration, self._run)
        # Where the whole folder was deleted, this is gone, too.
        if not (self._root / folders.CONFIG_FILE).exists():
            save_config(self._config, self._root / folders.CONFIG_FILE)
        if self._lease is not None:
            self._lease.remember()

    def _prune(self, iteration: int, keep_last: int) -> None:
        try:
            self._first_rank_writes(
                lambda: folders.prune(
                    self._root, keep_last, iteration, keep_before=self.keep_before
                )
            )
        except _NotWritten as error:
            self._say(f"--keep-last {keep_last}: an old checkpoint could not be deleted: {error}")


def _without_empty(values: dict[str, Any]) -> dict[str, Any]:
    """What megatron-core compares between ranks: pipeline ranks with and without memory layers
    differ in places where either has nothing."""
    kept = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in values.items()}
    return {name: value for name, value in kept.items() if value != {}}


def _strategy() -> Any:
    """Data-parallel replicas share the writing."""
    strategy = checkpoints.SaveStrategy("torch_dist", 1, thread_count=_FILES_A_RANK)
    if data_parallel_group().size() == 1:
        return strategy
    return FullyParallelSaveStrategyWrapper(strategy, data_parallel_group())
