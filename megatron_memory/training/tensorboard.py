"""Curves for TensorBoard."""

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_memory.exceptions import ConfigurationError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes curves on the first rank; nothing elsewhere, or without a directory.

    Args:
        directory: of `--tensorboard-dir`.
        first_iteration: the next one; what an interrupted run wrote from there on is hidden.
        is_writer: whether this rank writes.
        say: told when the curves cannot be written any more.

    Raises:
        ConfigurationError: the directory cannot be written to.
    """

    def __init__(
        self,
        directory: str | None,
        *,
        first_iteration: int,
        is_writer: bool,
        say: Callable[[str], None] = print,
    ):
        self._directory, self._say = directory, say
        self._writer: SummaryWriter | None = None
        if directory is not None and is_writer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                from torch.utils import tensorboard
            purge = first_iteration if first_iteration > 1 else None
            try:
                self._writer = tensorboard.SummaryWriter(directory, purge_step=purge)
            except OSError as error:
                raise ConfigurationError(
                    f"--tensorboard-dir {directory} cannot be written to: {error}. Give another "
                    "directory, or omit the flag"
                ) from error

    def add(self, iteration: int, curves: dict[str, float]) -> None:
        """Write a point of each curve."""
        if self._writer is None:
            return
        try:
            for name, value in curves.items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()
        except OSError as error:
            # TensorBoard's thread that writes has ended by it.
            self._say(
                f"--tensorboard-dir {self._directory} cannot be written to any more: {error}. The "
                "training goes on without curves"
            )
            self.close()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            # Nothing is lost that `add` has not told.
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None
