"""Back to the newest checkpoint of a run in the middle of it."""

import dataclasses
from pathlib import Path

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.finding import Found, Notify, find_start
from megatron_memory.training.checkpoint.loader import load_checkpoint
from megatron_memory.training.checkpoint.saver import CheckpointSaver
from megatron_memory.training.setup import TrainingSetup, whole_weights


class Rewinder:
    """Loads the newest complete checkpoint that this run has written or started from.

    Args:
        setup: of this rank.
        saver: of the run.
        start: what the run was loaded from; None where it began with random weights, or with
            `--finetune`.
        vocab_size: before padding.
        notify: receives lines.
    """

    def __init__(
        self,
        setup: TrainingSetup,
        saver: CheckpointSaver,
        start: Found | None,
        vocab_size: int,
        notify: Notify,
    ):
        self._setup, self._saver = setup, saver
        self._start = start
        self._vocab_size, self._notify = vocab_size, notify

    def __call__(self) -> int:
        """Load it, after what is being written is complete; a collective call.

        Returns:
            its iteration.

        Raises:
            CheckpointError: on every rank: there is none, or it is damaged.
        """
        self._saver.finish()
        folder = self._newest()
        checkpoint = dataclasses.replace(
            self._setup.config.checkpoint,
            load=str(folder),
            finetune=False,
            no_load_optim=False,
            exit_on_missing_checkpoint=True,
        )
        config = dataclasses.replace(self._setup.config, checkpoint=checkpoint)
        found = find_start(config, self._vocab_size, self._notify)
        assert found is not None, "a missing checkpoint is an error"
        with whole_weights(self._setup):
            load_checkpoint(dataclasses.replace(self._setup, config=config), found, self._notify)
        return found.common["iteration"]

    def _newest(self) -> Path:
        if self._saver.newest is not None:
            root = Path(str(self._setup.config.checkpoint.save))
            return folders.iteration_folder(root, self._saver.newest.iteration)
        if self._start is not None:
            return self._start.folder
        raise CheckpointError(
            "--on-bad-step rewind: this run has not saved a checkpoint yet. Lower --save-interval"
        )
