"""Writing checkpoints, in the foreground or behind the training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_memory.config import save_config
from megatron_memory.config.pools import with_share_groups
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import folders, state
from megatron_memory.training.checkpoint.agreement import ask_first_rank
from megatron_memory.training.checkpoint.checksums import MARK
from megatron_memory.training.checkpoint.checksums_together import join_sums, with_sums
from megatron_memory.training.checkpoint.integrity import check_whole
from megatron_memory.training.checkpoint.lease import Lease
from megatron_memory.training.checkpoint.state import Position
from megatron_memory.training.checkpoint.writer_queue import start_writer_queue
from megatron_memory.training.setup import TrainingSetup, data_parallel_group


class CheckpointSaver:
    """Writes a run's checkpoints to `--save`. Every method is a collective call.

    Args:
        setup: of this rank; `--save` must be given.
        vocab_size: tokens before padding, which belong to the model's identity.
        lease: on rank 0, of `--save`; None: the caller is sure to be alone.
        carried: plain values of the checkpoint that the run began with, which stay as they are.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        vocab_size: int,
        lease: Lease | None = None,
        carried: Mapping[str, Any] | None = None,
    ):
        assert setup.config.checkpoint.save is not None, "there is nowhere to save to"
        self._setup = setup
        self._config = with_share_groups(setup.config)
        self._vocab_size = vocab_size
        self._root = Path(setup.config.checkpoint.save)
        self._lease = lease
        self._carried = dict(carried or {})
        self._run = None if lease is None else lease.run
        self._strategy = _strategy()
        self._running = AsyncCallsQueue()
        self.newest: Position | None = None
        """Of the newest checkpoint that is complete."""
        self.keep_before: int | None = None
        """Iteration before which no checkpoint is deleted at present; None: `--keep-last` alone
        decides."""
        start_writer_queue()
        ask_first_rank(lambda: save_config(self._config, self._root / folders.CONFIG_FILE))

    def save(self, position: Position, more: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint; with `--async-save` it is complete only after a later `poll`.

        Args:
            position: how far the training is.
            more: further plain values, for the loader to find in `Found.common`.

        Returns:
            the folder that it has, or will have.

        Raises:
            CheckpointError: it, or the one before it, could not be written.
        """
        self.finish()
        folder = ask_first_rank(lambda: self._begin(position.iteration))
        try:
            request = dist_checkpointing.save(
                self._state(position) | dict(more or {}),
                str(folder),
                self._strategy,
                async_sharded_save=True,
                content_metadata=state.content_metadata(self._setup.config),
            )
            if self._has_sums:
                request = with_sums(request, folder, self._setup.config.checkpoint.checksums)
            request.add_finalize_fn(lambda: self._publish(position))
            if self._setup.config.checkpoint.async_save:
                self._running.schedule_async_request(request)
            else:
                request.execute_sync()
        except (CheckpointException, CheckpointingException, OSError, RuntimeError) as error:
            # RuntimeError: what torch's own writer says of a full disk.
            raise self._failed(error) from error
        return folders.iteration_folder(self._root, position.iteration)

    def poll(self) -> None:
        """Complete what is written by now; cheap where nothing is.

        Raises:
            CheckpointError: writing in the background failed.
        """
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            CheckpointError: writing in the background failed.
        """
        self._finalize(blocking=True)

    def _finalize(self, *, blocking: bool) -> None:
        try:
            self._running.maybe_finalize_async_calls(blocking=blocking)
        except (CheckpointException, CheckpointingException) as error:
            raise self._failed(error) from error

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

    def _begin(self, iteration: int) -> Path:
        if self._lease is not None:
            self._lease.require()
        return folders.begin(self._root, iteration, self._run)

    def _publish(self, position: Position) -> None:
        ask_first_rank(lambda: self._publish_and_prune(position.iteration))
        self.newest = position

    def _publish_and_prune(self, iteration: int) -> None:
        folder = folders.incomplete_folder(self._root, iteration, self._run)
        save_config(self._config, folder / folders.CONFIG_FILE)
        check_whole(folder)
        if self._has_sums:
            join_sums(folder, self._setup.config.checkpoint.checksums)
        if self._lease is not None:
            self._lease.require()
        folders.publish(self._root, iteration, self._run)
        keep_last = self._setup.config.checkpoint.keep_last
        if keep_last is not None:
            folders.prune(self._root, keep_last, iteration, keep_before=self.keep_before)

    def _failed(self, error: BaseException) -> CheckpointError:
        kept = f"iteration {self.newest.iteration}" if self.newest else "none of this run"
        return CheckpointError(
            f"--save {self._root}: the checkpoint could not be written: {error}. "
            f"Check the space and the permissions there; the newest complete checkpoint is {kept}"
        )


def _strategy() -> SaveShardedStrategy:
    """Data-parallel replicas share the writing."""
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1)
    if data_parallel_group().size() == 1:
        return strategy
    return FullyParallelSaveStrategyWrapper(strategy, data_parallel_group())
