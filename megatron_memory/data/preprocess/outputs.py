"""The outputs of a run, and how far they have come."""

import contextlib
import time
from collections.abc import Mapping
from typing import NoReturn

import numpy as np

from megatron_memory.data.indexed.writer import (
    PairWriter,
    publish_pair,
    remove_partial,
    write_error,
)
from megatron_memory.data.preprocess.encoding import EncodedBlock
from megatron_memory.data.preprocess.journal import Journal, State

_SECONDS_BETWEEN_RECORDS = 10.0


class Outputs:
    """A pair for each key. What is written is recorded every ten seconds; a run that ends before
    the first record leaves nothing behind, a longer one leaves what --resume goes on from."""

    def __init__(self, prefixes: Mapping[str, str], dtype: np.dtype, journal: Journal) -> None:
        """
        Args:
            prefixes: of each key's pair.
            dtype: of the token ids.
            journal: begun, or read and gone on with.
        """
        self.journal = journal
        extents = journal.state.extents if journal.state else {}
        self._writers = {
            key: PairWriter(prefix, dtype, extents.get(prefix)) for key, prefix in prefixes.items()
        }
        self.state = journal.state or State(extents=self._extents())
        self._next_record = time.monotonic() + _SECONDS_BETWEEN_RECORDS

    def add(self, block: EncodedBlock) -> None:
        """Append a block's documents.

        Raises:
            DataError: the disk is full.
        """
        try:
            for key, writer in self._writers.items():
                writer.add(block.tokens[key], block.lengths[key])
            before = self.state
            finished = before.finished_sources
            if block.end.source != before.position.source:
                finished = {**finished, before.position.source: before.position}
            # In one assignment: what interrupts this leaves a state that was whole.
            self.state = State(
                extents=self._extents(),
                position=block.end,
                finished_sources=finished,
                num_skipped=before.num_skipped + block.num_problems,
                num_bytes=before.num_bytes + block.num_bytes,
            )
            if time.monotonic() >= self._next_record:
                self._record()
        except OSError as error:
            self._raise_write_error(error)

    def num_documents(self) -> int:
        """Documents of all runs that wrote these outputs."""
        return next(iter(self.state.extents.values())).num_documents

    def publish(self, manifests: dict[str, dict]) -> None:
        """Complete all pairs and give them their names.

        Args:
            manifests: by prefix.

        Raises:
            DataError: the disk is full.
        """
        try:
            self._record()
            for writer in self._writers.values():
                writer.finish()
            self.journal.finish(manifests)
            for writer in self._writers.values():
                writer.publish(manifests[writer.prefix])
        except OSError as error:
            self._raise_write_error(error)
        self.journal.remove()

    def abandon(self) -> bool:
        """End without publishing; returns whether --resume can go on from what is left."""
        worth_keeping = self.journal.state is not None
        if worth_keeping and self.journal.manifests is None:
            # On a full disk the record before this one stands.
            with contextlib.suppress(OSError):
                self._record()
        for writer in self._writers.values():
            if worth_keeping:
                writer.close()
            else:
                writer.discard()
        if worth_keeping:
            self.journal.close()
        else:
            self.journal.remove()
        return worth_keeping

    def _extents(self) -> dict:
        return {writer.prefix: writer.extent for writer in self._writers.values()}

    def _record(self) -> None:
        for writer in self._writers.values():
            writer.sync()
        self.journal.record(self.state)
        self._next_record = time.monotonic() + _SECONDS_BETWEEN_RECORDS

    def _raise_write_error(self, error: OSError) -> NoReturn:
        names = ", ".join(writer.prefix for writer in self._writers.values())
        raise write_error(names, error) from error


def finish_publishing(journal: Journal) -> None:
    """Give complete pairs the names that a crash kept from them."""
    assert journal.manifests is not None
    for prefix, manifest in journal.manifests.items():
        publish_pair(prefix, manifest)
    journal.remove()


def remove_leftovers(prefixes: Mapping[str, str], journal: Journal) -> None:
    """Remove what a run left that recorded nothing."""
    for prefix in prefixes.values():
        remove_partial(prefix)
    journal.remove()
