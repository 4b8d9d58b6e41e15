"""Writes `.bin`/`.idx` pairs that appear under their names only when they are complete."""

import os

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)


class IndexedOutput:
    """One `.bin`/`.idx` pair, written beside its final place."""

    def __init__(self, prefix: str, dtype: type[np.number]) -> None:
        self.prefix = prefix
        self._temporary_prefix = f"{prefix}.{os.getpid()}.tmp"
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        self._builder = IndexedDatasetBuilder(get_bin_path(self._temporary_prefix), dtype=dtype)

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        An empty document has no sequence but keeps its place among the documents, as Megatron-LM
        writes it.

        Args:
            tokens: ids of all documents, one after the other, [tokens].
            lengths: tokens of each document, [documents].
        """
        end = 0
        for length in lengths.tolist():
            begin, end = end, end + length
            self._builder.add_document(tokens[begin:end], [length] if length else [])

    def finish(self) -> None:
        """Write the index and bring both files to the disk; they still have their other names."""
        self._builder.finalize(get_idx_path(self._temporary_prefix))
        for path in self._temporary_paths():
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())

    def publish(self) -> None:
        """Give both files their names. An older pair of that name disappears, index first, so that
        no crash leaves the index of one run beside the tokens of another."""
        if os.path.exists(get_idx_path(self.prefix)):
            os.unlink(get_idx_path(self.prefix))
        os.replace(get_bin_path(self._temporary_prefix), get_bin_path(self.prefix))
        os.replace(get_idx_path(self._temporary_prefix), get_idx_path(self.prefix))

    def discard(self) -> None:
        """Remove what was written and is not published."""
        self._builder.data_file.close()
        for path in self._temporary_paths():
            if os.path.exists(path):
                os.unlink(path)

    def _temporary_paths(self) -> tuple[str, str]:
        return get_bin_path(self._temporary_prefix), get_idx_path(self._temporary_prefix)
