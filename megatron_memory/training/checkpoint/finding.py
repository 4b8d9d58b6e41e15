"""Finding checkpoints, and what is checked of one before anything is built."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_memory.config import Config
from megatron_memory.data.tokenizers import padded_vocab_size
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.agreement import ask_first_rank
from megatron_memory.training.checkpoint.architecture import check_same_architecture, saved_config
from megatron_memory.training.checkpoint.checksums import NO_SUMS, check_sums
from megatron_memory.training.checkpoint.checksums_together import compared_meanwhile
from megatron_memory.training.checkpoint.common_state import read_values
from megatron_memory.training.checkpoint.integrity import check_whole, tensor_shapes
from megatron_memory.training.checkpoint.plain_values import check_plain_values
from megatron_memory.training.checkpoint.shared import check_load_is_alike
from megatron_memory.training.checkpoint.state import Position

Notify = Callable[[str], None]

_NEEDED_TO_GO_ON = ("iteration", "consumed_samples", "layout", "has_generators", "device")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that is whole and holds this run's model."""

    folder: Path
    metadata: Metadata
    """Its list of tensors."""
    shapes: dict[str, tuple[int, ...]]
    """Global shapes of its tensors."""
    objects: frozenset[str]
    """Names of what else it stores for the model's modules or for ranks."""
    common: dict[str, Any]
    """Its plain values."""
    notes: list[str]
    """Differences to tell the user."""
    saved: Config | None
    """The configuration that wrote it; None: another program did."""


def locate(load: Path) -> Path | None:
    """The checkpoint that `--load` means: the tracker's, or the iteration folder itself.

    Without a tracker it is the newest: the first save was interrupted before the tracker was
    written, or the checkpoint was copied alone.

    Returns:
        None where there is none at all.

    Raises:
        CheckpointError: the tracker is damaged.
    """
    # Unlike Path.is_dir these do not raise on a name that is too long, or on one within a file.
    if os.path.lexists(load) and not os.path.isdir(load):
        raise CheckpointError(f"--load {load}: is no folder. Give the one that a run saved to")
    if folders.iteration_of(load) is not None:
        return load
    iteration = folders.read_tracker(load)
    if iteration is not None:
        return folders.published_folder(load, iteration)
    saved = folders.saved_iterations(load)
    return folders.published_folder(load, saved[-1]) if saved else None


def find_checkpoint(load: Path, config: Config, vocab_size: int) -> Found | None:
    """Locate a checkpoint and check it, on one rank and without torch.distributed.

    Returns:
        None where there is none at all.

    Raises:
        CheckpointError: it is damaged (and which older one is not), or of another architecture. The
            files with its tensors are counted only: see `comparing_content`.
    """
    folder = locate(load)
    if folder is None:
        return None
    try:
        metadata = check_whole(folder)
        common = read_common(folder, metadata)
        if config.checkpoint.checksums != "none":
            check_small_files(folder, common)
    except CheckpointError as error:
        raise CheckpointError(
            f"--load {load}: {error}.{_loadable_instead(folder.parent)}"
        ) from error
    saved = saved_config(folder)
    notes = [] if saved is None else check_same_architecture(folder, saved, config)
    shapes = tensor_shapes(metadata)
    notes += _vocabulary_notes(folder, common.get("vocab_size", vocab_size), vocab_size, shapes)
    objects = frozenset(metadata.state_dict_metadata.keys() - shapes.keys())
    return Found(
        folder=folder,
        metadata=metadata,
        shapes=shapes,
        objects=objects,
        common=common,
        notes=notes,
        saved=saved,
    )


def _vocabulary_notes(
    folder: Path, saved: int, ours: int, shapes: dict[str, tuple[int, ...]]
) -> list[str]:
    """That every id of this run has a row in the checkpoint: among its tokens, or its padding.

    Raises:
        CheckpointError: there are too few, or the run has fewer tokens than the checkpoint.
    """
    if saved == ours:
        return []
    rows = shapes.get("embedding.word_embeddings.weight", (saved,))[0]
    if saved < ours <= rows:
        return [
            f"--vocab-size {saved} there, {ours} here: ids {saved} to {ours - 1} take rows of the "
            "vocabulary's padding, which no token has trained"
        ]
    raise CheckpointError(
        f"{folder} was trained with {saved} tokens, and the tokenizer of this run (or "
        f"--vocab-size) has {ours}, with {rows} rows to take them from. Use the tokenizer it was "
        f"trained with, or give --vocab-size: {saved} to {rows}"
    )


def _padding_change(found: Found, config: Config, vocab_size: int) -> str | None:
    """The softmax of every loss goes over the vocabulary's padding, too, as in Megatron-LM."""
    here = padded_vocab_size(
        vocab_size,
        config.data.make_vocab_size_divisible_by,
        config.parallel.tensor_model_parallel_size,
    )
    there = found.shapes.get("embedding.word_embeddings.weight", (here,))[0]
    if there == here:
        return None
    how = f"{here - there} untrained rows take part" if here > there else "fewer rows take part"
    return (
        f"{found.folder} has {there} rows of vocabulary, and here its {vocab_size} tokens are "
        f"padded to {here} (--make-vocab-size-divisible-by "
        f"{config.data.make_vocab_size_divisible_by} x --tensor-model-parallel-size "
        f"{config.parallel.tensor_model_parallel_size}): {how} in every loss, so that losses do "
        "not compare with its own"
    )


def read_common(folder: Path, metadata: Metadata | None = None) -> dict[str, Any]:
    """A checkpoint's plain values. `metadata`: its list of tensors, where that was read already.

    Raises:
        CheckpointError: they are damaged, hold code, or contradict the folder's name.
    """
    common, path = read_values(folder, metadata)
    try:
        check_plain_values(common, folders.iteration_of(folder))
    except UnsafeFile as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return common


def _loadable_instead(root: Path) -> str:
    """Which checkpoint to load where another one cannot be."""
    for iteration in reversed(folders.saved_iterations(root)):
        folder = folders.published_folder(root, iteration)
        with contextlib.suppress(CheckpointError):
            check_sums(folder, read_common(folder, check_whole(folder)))
            return f" Complete is iteration {iteration}: --load {folder}"
    return f" There is no complete checkpoint in {root}"


def check_small_files(folder: Path, common: dict[str, Any]) -> None:
    """Compare all files but those with tensors, which are only counted.

    Raises:
        CheckpointError: one is damaged, or any is missing, extra or of another size.
    """
    check_sums(folder, common, only=lambda name: not name.endswith(".distcp"))


def read_intact_common(folder: Path) -> dict[str, Any]:
    """The plain values of a checkpoint to be loaded, after `check_small_files`.

    Raises:
        CheckpointError: as that says, and which other checkpoint can be loaded.
    """
    try:
        common = read_common(folder)
        check_small_files(folder, common)
    except CheckpointError as error:
        raise CheckpointError(f"{error}.{_loadable_instead(folder.parent)}") from error
    return common


@contextlib.contextmanager
def comparing_content(found: Found, checksums: str, notify: Notify) -> Iterator[None]:
    """Compare all files of a checkpoint with their sums while they are read; see
    `compared_meanwhile`.

    Raises:
        CheckpointError: on every rank: a file is damaged; and which older checkpoint is not.
    """
    if checksums == "none":
        notify(f"{found.folder}: its files are not compared with their sums (--checksums none)")
        yield
        return

    def advice() -> str:
        # On one rank, which has the other ranks wait: this is the way out, not the rule.
        return ask_first_rank(lambda: _loadable_instead(found.folder.parent))

    with compared_meanwhile(found.folder, found.common, advice) as has_sums:
        if not has_sums:
            notify(NO_SUMS.format(found.folder))
        yield


def find_start(config: Config, vocab_size: int, notify: Notify) -> Found | None:
    """The checkpoint that `--load` names, checked before anything is built, but for the content of
    the files with its tensors; a collective call.

    Returns:
        None where the training starts from random weights.

    Raises:
        CheckpointError: on every rank; see `find_checkpoint` and `check_load_is_alike`.
    """
    checkpoint = config.checkpoint
    if checkpoint.load is None:
        return None
    load = Path(checkpoint.load)
    found = ask_first_rank(lambda: find_checkpoint(load, config, vocab_size))
    if found is None:
        if checkpoint.exit_on_missing_checkpoint:
            raise CheckpointError(f"--load {load}: there is no checkpoint. Check the path")
        notify(f"no checkpoint in {load}: starting from random weights")
        return None
    if found.folder != load:
        newest = ask_first_rank(lambda: max(folders.saved_iterations(load), default=0))
        if newest > (folders.iteration_of(found.folder) or 0):
            notify(
                f"{load / folders.TRACKER} names {found.folder.name}, though iteration {newest} is "
                f"there as well: --load {folders.published_folder(load, newest)} takes that one"
            )
    check_load_is_alike(found.folder)
    if not checkpoint.finetune:
        _require_ours(found, with_optimizer=not checkpoint.no_load_optim)
    for note in found.notes:
        notify(f"{found.folder} was trained with another setting: {note}")
    if (change := _padding_change(found, config, vocab_size)) is not None:
        notify(change)
    return found


def start_position(found: Found | None, config: Config) -> Position:
    """Where the training goes on; the start without a checkpoint, or with `--finetune`."""
    if found is None or config.checkpoint.finetune:
        return Position()
    common = found.common
    return Position(iteration=common["iteration"], consumed_samples=common["consumed_samples"])


def _require_ours(found: Found, *, with_optimizer: bool) -> None:
    missing = [key for key in _NEEDED_TO_GO_ON if key not in found.common]
    if missing:
        raise CheckpointError(
            f"{found.folder} was written by another program: it does not say {', '.join(missing)}. "
            "Load its weights with --finetune"
        )
    if with_optimizer and not found.common.keys() & {"optimizer", "optimizer_step"}:
        raise CheckpointError(
            f"{found.folder} holds no optimizer state (it was saved with --no-save-optim, or made "
            "of one without). Start a new training from its weights with --finetune, or go on "
            "from its iteration with --no-load-optim"
        )
