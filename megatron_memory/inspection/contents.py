"""A checkpoint that is open: what it says of itself, and its tensors, not yet read."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from megatron_memory.config import Config
from megatron_memory.conversion.convert import read_checkpoint
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.megatron import read_megatron
from megatron_memory.conversion.options import Format
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.exceptions import CheckpointError
from megatron_memory.inspection.files import folder_of, read_files
from megatron_memory.inspection.formats import detect_format
from megatron_memory.memory.usage import USAGE_PREFIX
from megatron_memory.training.checkpoint.architecture import saved_config
from megatron_memory.training.checkpoint.checksums import NO_SUMS, check_sums
from megatron_memory.training.checkpoint.finding import read_common
from megatron_memory.training.checkpoint.folders import iteration_of

NO_MODEL = "it cannot be read as a model"
STATE = "optimizer.state."
MAIN_WEIGHTS = f"{STATE}fp32_param."
_EMBEDDING = "embedding.word_embeddings.weight"
_OF_MEGATRON = re.compile(r"optimizer\.state\.(\w+?)\.")
_OF_LINGUA = re.compile(r"optim\.state\..*\.(\w+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """A checkpoint's content."""

    load: Path
    """What was named."""
    format: Format
    folder: Path
    """Where its files are."""
    tensors: Tensors
    """By our names, as in a Megatron checkpoint; or by the files' own, see `is_raw`."""
    is_raw: bool
    """Whether the names are the files' own."""
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    """Tensors that the format keeps again under another name: name to that of the first."""
    config: Config | None = None
    """Of the run, as far as the format tells."""
    iteration: int | None = None
    consumed_samples: int | None = None
    vocab_size: int | None = None
    """Tokens before padding."""
    padded_vocab_size: int | None = None
    """Rows of the embedding in the files."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other plain values of a Megatron checkpoint."""
    damage: tuple[str, ...] = ()
    """What is wrong with its files."""
    notes: tuple[str, ...] = ()
    """What else is to be told."""

    @property
    def num_bytes(self) -> int:
        """Of its files."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    @property
    def num_tokens(self) -> int | None:
        """Tokens trained on."""
        if self.consumed_samples is None or self.config is None:
            return None
        return self.consumed_samples * self.config.model.seq_length

    @property
    def states(self) -> list[str]:
        """Kinds of the optimizer's tensors."""
        pattern = _OF_LINGUA if self.is_raw and self.format == "lingua" else _OF_MEGATRON
        return sorted({m[1] for name in self.tensors if (m := pattern.match(name))})

    @property
    def optimizer_step(self) -> int | None:
        """Updates that its states have seen."""
        if not self.states:
            return None
        found = sorted(_steps(self.common.get("optimizer")))
        return found[-1] if found else self.common.get("optimizer_step", self.iteration)


def _steps(value: Any) -> set[int]:
    if not isinstance(value, dict | list):
        return set()
    inner = list(value.values()) if isinstance(value, dict) else value
    found = {step for part in inner for step in _steps(part)}
    step = value.get("step") if isinstance(value, dict) else None
    return found | ({int(step)} if isinstance(step, int | float) else set())


def open_checkpoint(
    load: Path, format_name: Format | None = None, *, raw: bool, verify: bool = False
) -> Contents:
    """Open a checkpoint: by our names where it can be read as a model, else by its files' names.

    Args:
        load: a run's folder or a checkpoint's.
        format_name: None: found by its files.
        raw: always by its files' names.
        verify: compare its files with their checksums.

    Raises:
        CheckpointError: there is none, or nothing can be said about what it holds.
    """
    format_name = format_name or detect_format(load)
    if not load.is_dir():
        raise CheckpointError(f"--load {load}: there is no such folder. Check the path")
    folder = folder_of(load, format_name)
    files, damage = read_files(folder, format_name)
    notes = _verify(folder, format_name, damage) if verify else []
    if raw:
        return _by_file(load, format_name, folder, files, damage, notes)
    try:
        state = _read(format_name, load)
    except CheckpointError as error:
        damage.append(f"{NO_MODEL}, hence the files' own names: {error}")
        return _by_file(load, format_name, folder, files, damage, notes)
    padded = files.get(_EMBEDDING)
    copies = _copies(state)
    tensors = _by_our_names(state) | {name: copy for name, (_, copy) in copies.items()}
    return Contents(
        load=load,
        format=format_name,
        folder=folder,
        tensors=_in_order(tensors),
        is_raw=False,
        copies={name: first for name, (first, _) in copies.items()},
        config=state.config,
        iteration=state.iteration,
        consumed_samples=state.consumed_samples,
        vocab_size=state.vocab_size,
        padded_vocab_size=None if padded is None else padded.num_rows,
        common=state.common,
        damage=tuple(damage),
        notes=(*notes, *state.notes),
    )


def _read(format_name: Format, load: Path) -> SavedState:
    """Its sums are compared where that is asked for: otherwise a look reads all files twice."""
    if format_name == "megatron":
        return read_megatron(load, with_sums=False)
    return read_checkpoint(format_name, load)


def _verify(folder: Path, format_name: Format, damage: list[str]) -> list[str]:
    """Add what is damaged to the list, and return what else is to be told."""
    if format_name != "megatron":
        return [f"--verify: a checkpoint of the format {format_name} has no checksums"]
    try:
        has_sums = check_sums(folder, _common(folder, damage))
    except CheckpointError as error:
        damage.append(str(error))
        return []
    return ["every file is what was written"] if has_sums else [NO_SUMS.format(folder)]


def _common(folder: Path, damage: list[str]) -> dict[str, Any]:
    try:
        return read_common(folder)
    except CheckpointError as error:
        damage.append(str(error))
        return {}


def _by_our_names(state: SavedState) -> Tensors:
    tensors = dict(state.weights)
    tensors |= {MAIN_WEIGHTS + name: tensor for name, tensor in state.main_weights.items()}
    tensors |= state.usage
    for kind, moments in state.moments.items():
        tensors |= {f"{STATE}{kind}.{name}": tensor for name, tensor in moments.items()}
    return tensors


def _in_order(tensors: Tensors) -> Tensors:
    """Layer 10 behind layer 9, the optimizer's behind the model's."""

    def place(name: str) -> tuple:
        numbered = re.split(r"(\d+)", name)
        place = (name.startswith("optim"), name.startswith(USAGE_PREFIX))
        return *place, [int(w) if w.isdecimal() else w for w in numbered]

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def _copies(state: SavedState) -> dict[str, tuple[str, LazyTensor]]:
    names = {id(tensor): name for name, tensor in state.weights.items()}
    return {name: (names[id(first)], copy) for name, first, copy in state.twins}


def _by_file(
    load: Path, format_name: Format, folder: Path, files: Tensors, damage: list[str], notes: list
) -> Contents:
    config, common = None, dict[str, Any]()
    if format_name == "megatron":
        try:
            config = saved_config(folder)
            if config is None:
                notes.append("there is no config.yaml: another program wrote it, or it was left")
        except CheckpointError as error:
            damage.append(str(error))
        common = _common(folder, damage)
    padded = files.get(_EMBEDDING)
    return Contents(
        load=load,
        format=format_name,
        folder=folder,
        tensors=_in_order(files),
        is_raw=True,
        config=config,
        iteration=common.get("iteration", iteration_of(folder)),
        consumed_samples=common.get("consumed_samples"),
        vocab_size=common.get("vocab_size"),
        padded_vocab_size=None if padded is None else padded.num_rows,
        common=common,
        damage=tuple(damage),
        notes=tuple(notes),
    )
