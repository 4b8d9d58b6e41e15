"""How far a run has come, written down so that another process can go on from there.

A file of JSON lines: first what the run was told, then now and then how much of each output and
input is done, and in the end the manifests. A line that a crash cut off does not count. Each has a
sum of itself and all before it: a wrong digit would leave documents out, or repeat some.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from typing import Any

import xxhash

from megatron_memory.data.indexed.writer import Extent
from megatron_memory.data.preprocess.blocks import Position
from megatron_memory.exceptions import DataError
from megatron_memory.reading.documents import LARGEST_JSON, parse_json, read_bounded
from megatron_memory.reading.pickles import UnsafeFile

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
        self._sum = ""
        self._num_bytes = 0
        """Of whole lines, which are what counts."""
        with contextlib.suppress(FileNotFoundError):
            self._load()

    def _load(self) -> None:
        try:
            content = read_bounded(self.path, LARGEST_JSON)
            # Behind the last newline is nothing, or a line that a crash cut off.
            self._num_bytes = content.rfind(b"\n") + 1
            entries = [*self._entries(content.split(b"\n")[:-1])]
            if not entries:
                return
            identity = entries[0]["identity"]
            for entry in entries[1:]:
                manifests = entry.get("manifests")
                self.manifests = None if manifests is None else self._by_path(manifests)
                if "extents" in entry:
                    self.state = self._state_from(entry)
            self.identity = identity
        except FileNotFoundError:
            raise
        except (OSError, UnsafeFile, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}: damaged, or of an older version ({error}). Remove it to start over "
                "without --resume"
            ) from error

    def _entries(self, lines: list[bytes]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            entry = parse_json(line)
            said = entry.pop("sum", None)
            self._sum = _sum(self._sum, entry)
            if said != self._sum:
                raise UnsafeFile(f"line {number} is not what was written")
            yield entry

    def _by_path(self, by_name: dict[str, Any]) -> dict[str, Any]:
        """The outputs lie beside the journal, wherever a run finds it."""
        folder = os.path.dirname(self.path)
        return {os.path.join(folder, name): value for name, value in by_name.items()}

    def check_outputs(self, prefixes: Collection[str]) -> None:
        """That the interrupted run wrote these outputs.

        Raises:
            DataError: it wrote others: some file was given another name.
        """
        written = self.manifests or (self.state.extents if self.state else None)
        if written is not None and written.keys() != set(prefixes):
            raise DataError(
                f"{self.path}: is of {', '.join(sorted(written))}, and not of "
                f"{', '.join(sorted(prefixes))}: give the files their names back, or remove this "
                "one to start over without --resume"
            )

    def begin(self, identity: Identity) -> None:
        """Write a new journal in place of any there was."""
        self.close()
        self._stream = open(self.path, "wb")  # noqa: SIM115
        self._sum = ""
        self.identity, self.state, self.manifests = identity, None, None
        self._append({"identity": identity})

    def go_on(self) -> None:
        """Append to the journal that was there."""
        self._stream = open(self.path, "r+b")  # noqa: SIM115
        self._stream.truncate(self._num_bytes)
        self._stream.seek(self._num_bytes)

    def record(self, state: State) -> None:
        """Write down how far the run is; what it says must be on the disk."""
        before = self.state.finished_sources if self.state else {}
        entry = {
            "extents": {
                os.path.basename(prefix): dataclasses.astuple(extent)
                for prefix, extent in state.extents.items()
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
        by_name = {os.path.basename(prefix): manifest for prefix, manifest in manifests.items()}
        self._append({"manifests": by_name})
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
        self._sum = _sum(self._sum, entry)
        self._stream.write(json.dumps(entry | {"sum": self._sum}).encode() + b"\n")
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def _state_from(self, entry: dict[str, Any]) -> State:
        finished = dict(self.state.finished_sources) if self.state else {}
        for source, position in entry["finished_sources"].items():
            finished[int(source)] = Position(**position)
        extents = {}
        for name, (tokens, sequences, documents) in self._by_path(entry["extents"]).items():
            extents[name] = Extent(
                num_tokens=tokens, num_sequences=sequences, num_documents=documents
            )
        return State(
            extents=extents,
            position=Position(**entry["position"]),
            finished_sources=finished,
            num_skipped=entry["num_skipped"],
            num_bytes=entry["num_bytes"],
        )


def _sum(before: str, entry: dict[str, Any]) -> str:
    return xxhash.xxh3_128(before.encode() + json.dumps(entry).encode()).hexdigest()


def identity_hash(identity: Identity) -> str:
    """A name for all that an output depends on."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
