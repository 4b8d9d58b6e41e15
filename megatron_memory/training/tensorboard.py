"""Curves for TensorBoard."""

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Curves:
    """Writes curves on the first rank; nothing elsewhere, or without a directory.

    Args:
        directory: of `--tensorboard-dir`.
        first_iteration: the next one; what an interrupted run wrote from there on is hidden.
        is_writer: whether this rank writes.
    """

    def __init__(self, directory: str | None, *, first_iteration: int, is_writer: bool):
        self._writer: SummaryWriter | None = None
        if directory is not None and is_writer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                from torch.utils import tensorboard
            purge = first_iteration if first_iteration > 1 else None
            self._writer = tensorboard.SummaryWriter(directory, purge_step=purge)

    def add(self, iteration: int, curves: dict[str, float]) -> None:
        """Write a point of each curve."""
        if self._writer is not None:
            for name, value in curves.items():
                self._writer.add_scalar(name, value, iteration)
            self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
