"""May this run write to `--save`, and what becomes of the checkpoints that are there?

A run goes on with a folder's checkpoints, or it starts in a folder without any. So the tracker
always names the newest checkpoint of the run that wrote last, and no two runs' files are mixed.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_memory.config import CheckpointConfig
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.agreement import ask_first_rank, described
from megatron_memory.training.checkpoint.lease import Lease
from megatron_memory.training.checkpoint.writer_errors import advice

_EARLIER = "earlier-{}"
_ANEW = "--start-anew moves what is there to a folder {earlier} and begins at iteration 0"


@contextlib.contextmanager
def only_writer(checkpoint: CheckpointConfig, say: Callable[[str], None]) -> Iterator[Lease | None]:
    """While this is entered, no other run writes to `--save`; a collective call.

    Leftovers of dead runs are removed.

    Yields:
        the right to write, on rank 0; None on the others, and where nothing is saved.

    Raises:
        CheckpointError: on every rank: another run writes there, or nobody may.
    """
    held: list[Lease] = []

    def hold(root: Path) -> tuple[int | None, list[str]]:
        try:
            held.append(Lease(root, say))
            return folders.finish_publishing(root), folders.remove_leftovers(root)
        except OSError as error:
            raise CheckpointError(
                f"--save {root} cannot be written to: {described(error)}. {advice(error.errno)}"
            ) from error

    try:
        if checkpoint.save is not None:
            root = Path(checkpoint.save)
            finished, removed = ask_first_rank(lambda: hold(root))
            if finished is not None:
                say(
                    f"{root}: an earlier run was ended while it published iteration {finished}, "
                    "which is complete: it is the newest"
                )
            for name in removed:
                say(f"{root / name} was left unfinished by an earlier run: deleted")
        yield held[0] if held else None
    finally:
        for lease in held:
            with contextlib.suppress(OSError):
                lease.release()


def settle_save(checkpoint: CheckpointConfig, loaded: Path | None) -> None:
    """`check_continues` for all ranks; a collective call."""
    if checkpoint.save is not None:
        ask_first_rank(lambda: check_continues(checkpoint, loaded))


def clear_save(
    checkpoint: CheckpointConfig, loaded: Path | None, say: Callable[[str], None]
) -> None:
    """`make_way` for all ranks; a collective call."""
    if checkpoint.save is not None:
        line = ask_first_rank(lambda: make_way(checkpoint, loaded))
        if line is not None:
            say(line)


def check_continues(checkpoint: CheckpointConfig, loaded: Path | None) -> None:
    """That `--save` holds no checkpoints but those that this run goes on with.

    Args:
        checkpoint: with `save`.
        loaded: folder of the checkpoint that `--load` means.

    Raises:
        CheckpointError: names what is there, and the flags for each thing the user may mean.
    """
    assert checkpoint.save is not None, "there is nothing to check"
    root = Path(checkpoint.save)
    saved = folders.saved_iterations(root)
    if not saved:
        return
    is_own = loaded is not None and _same(loaded.parent, root)
    if checkpoint.start_anew:
        if is_own:
            raise CheckpointError(
                f"--start-anew would move away what --load {checkpoint.load} reads. Omit one of "
                "the two, or give another --save"
            )
        return
    anew = _ANEW.format(earlier=_next_earlier(root))
    there = f"--save {root} has checkpoints up to iteration {saved[-1]}"
    if is_own and checkpoint.finetune:
        raise CheckpointError(
            f"{there}, and --finetune --load {checkpoint.load} would begin at iteration 0 in the "
            "folder it takes its weights from. Give another --save; or omit --finetune to go on"
        )
    if not is_own:
        instead = f", but --load {checkpoint.load} is another folder" if checkpoint.load else ""
        raise CheckpointError(
            f"{there}{instead}. To go on with them: --load {root}"
            f"{' without --finetune' if checkpoint.finetune else ''}; to keep them: another "
            f"--save; {anew}"
        )


def make_way(checkpoint: CheckpointConfig, loaded: Path | None) -> str | None:
    """Move checkpoints that this run does not go on with to a folder `earlier-N` in `--save`.

    Those are all with `--start-anew`, and otherwise those after the iteration that is loaded.

    Returns:
        a line for the user; None where nothing was in the way.
    """
    assert checkpoint.save is not None, "there is nothing to make way in"
    root = Path(checkpoint.save)
    saved = folders.saved_iterations(root)
    iteration = None if loaded is None else folders.iteration_of(loaded)
    if not checkpoint.start_anew:
        is_own = loaded is not None and _same(loaded.parent, root)
        if iteration is None or not is_own:
            return None
        saved = [i for i in saved if i > iteration]
    if not saved:
        return None
    earlier = root / _next_earlier(root)
    earlier.mkdir()
    # At each moment the tracker of a folder names a checkpoint that is in it, or there is none.
    if checkpoint.start_anew:
        (root / folders.TRACKER).unlink(missing_ok=True)
    elif iteration is not None:
        folders.write_tracker(root, iteration)
    if (root / folders.CONFIG_FILE).is_file():
        shutil.copyfile(root / folders.CONFIG_FILE, earlier / folders.CONFIG_FILE)
    for number in saved:
        folder = folders.published_folder(root, number)
        os.rename(folder, folders.iteration_folder(earlier, number))
    folders.write_tracker(earlier, saved[-1])
    which = f"{saved[0]} to {saved[-1]}" if len(saved) > 1 else str(saved[0])
    if checkpoint.start_anew:
        return f"--start-anew: checkpoints of iteration {which} are moved to {earlier}"
    return (
        f"this run goes on from iteration {iteration}: checkpoints of iteration {which}, which "
        f"are newer, are moved to {earlier}. To go on from those instead: --load {earlier} "
        f"--save {earlier}"
    )


def _next_earlier(root: Path) -> str:
    number = 1
    while (root / _EARLIER.format(number)).exists():
        number += 1
    return _EARLIER.format(number)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
