"""How far a run has come, written down so that another process can go on from there.

A file of JSON lines: first what the run was told, then now and then how much of each output and
input is done, and in the end the manifests. A line that a crash cut off does not count.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any

from megatron_memory.data.indexed.writer import Extent
from megatron_memory.data.preprocess.blocks import Position
from megatron_memory.exceptions import DataError

Identity = dict[str, Any]
"""All that the output depends on: options, tokenizer, inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """How far a run has come."""

    extents: dict[str, Extent]
    """Of each output, by its prefix."""
    position: Position = Position()
    finished_sources: dict[int, Position] = dataclasses.field(default_factory=dict)
    """The inputs before `position.source`, each read to its end."""
    num_skipped: int = 0
    """Lines left out, with --on-error skip."""
    num_bytes: int = 0
    """Bytes of text, decompressed."""


class Journal:
    """The journal of the run that writes `PREFIX`. Whoever opens one holds its OutputLock."""

    def __init__(self, prefix: str) -> None:
        self.path = prefix + ".journal"
        self.identity: Identity | None = None
        """What the interrupted run was told; None if there was none."""
        self.state: State | None = None
        """How far it came; None if it wrote nothing worth keeping."""
        self.manifests: dict[str, dict] | None = None
        """Of each output, if only their names are missing."""
        self._stream: Any = None
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as stream:
            self._load(stream.read().split(b"\n"))

    def _load(self, lines: list[bytes]) -> None:
        try:
            # Behind the last newline is nothing, or a line that a crash cut off.
            entries = [json.loads(line) for line in lines[:-1]]
            if not entries:
                return
            identity = entries[0]["identity"]
            for entry in entries[1:]:
                self.manifests = entry.get("manifests")
                if "extents" in entry:
                    self.state = _state_from(entry, self.state)
            self.identity = identity
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}: damaged ({error}). Remove it to start over without --resume"
            ) from error

    def begin(self, identity: Identity) -> None:
        """Write a new journal in place of any there was."""
        self.close()
        self._stream = open(self.path, "wb")  # noqa: SIM115
        self.identity, self.state, self.manifests = identity, None, None
        self._append({"identity": identity})

    def go_on(self) -> None:
        """Append to the journal that was there."""
        with open(self.path, "rb") as stream:
            complete = stream.read().rfind(b"\n") + 1
        self._stream = open(self.path, "r+b")  # noqa: SIM115
        self._stream.truncate(complete)
        self._stream.seek(complete)

    def record(self, state: State) -> None:
        """Write down how far the run is; what it says must be on the disk."""
        before = self.state.finished_sources if self.state else {}
        entry = {
            "extents": {
                prefix: dataclasses.astuple(extent) for prefix, extent in state.extents.items()
            },
            "position": dataclasses.asdict(state.position),
            "num_skipped": state.num_skipped,
            "num_bytes": state.num_bytes,
            # Only those that are new: there may be thousands.
            "finished_sources": {
                source: dataclasses.asdict(position)
                for source, position in state.finished_sources.items()
                if source not in before
            },
        }
        self._append(entry)
        self.state = dataclasses.replace(state, finished_sources=dict(state.finished_sources))

    def finish(self, manifests: dict[str, dict]) -> None:
        """Write down that the outputs are complete but for their names."""
        self._append({"manifests": manifests})
        self.manifests = manifests

    def remove(self) -> None:
        """The run needs no journal any more."""
        self.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def close(self) -> None:
        """Leave the journal for another process."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    def _append(self, entry: dict[str, Any]) -> None:
        self._stream.write(json.dumps(entry).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())


def identity_hash(identity: Identity) -> str:
    """A name for all that an output depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _state_from(entry: dict[str, Any], before: State | None) -> State:
    finished = dict(before.finished_sources) if before else {}
    for source, position in entry["finished_sources"].items():
        finished[int(source)] = Position(**position)
    extents = {}
    for prefix, (tokens, sequences, documents) in entry["extents"].items():
        extents[prefix] = Extent(
            num_tokens=tokens, num_sequences=sequences, num_documents=documents
        )
    return State(
        extents=extents,
        position=Position(**entry["position"]),
        finished_sources=finished,
        num_skipped=entry["num_skipped"],
        num_bytes=entry["num_bytes"],
    )
