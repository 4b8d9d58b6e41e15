"""Files of a folder that someone gives us: no link in it may bring a file in from elsewhere.

What a conversion writes is meant to be published. A link of the folder to a file outside it would
publish that file. The cache of the Hugging Face hub is made of links all the same,

    models--OWNER--NAME/snapshots/REVISION/config.json -> ../../blobs/HASH

so that links of a snapshot into the `blobs` of its own repository are followed. A training and a
generation, which publish nothing, read whatever a checkpoint's links lead to.
"""

from collections.abc import Iterable
from pathlib import Path

from megatron_memory.exceptions import CheckpointError

_REPOSITORY = "models--"


def files_of(folder: Path, names: Iterable[str]) -> list[Path]:
    """Those of the named files that are there.

    Raises:
        CheckpointError: one is a link to somewhere outside of the folder.
    """
    found = [folder / name for name in names if (folder / name).is_file()]
    for path in found:
        check_is_inside(folder, path)
    return found


def check_links(folder: Path, suffixes: Iterable[str] | None = None) -> None:
    """Refuse a folder in which a file of these kinds is a link to somewhere outside of it.

    Args:
        folder: to look into.
        suffixes: of the files that are read; None: all are.

    Raises:
        CheckpointError: names the file.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from error
    for path in paths:
        if (suffixes is None or path.suffix in suffixes) and path.is_file():
            check_is_inside(folder, path)


def check_checkpoint_links(load: Path, folder: Path) -> None:
    """Refuse a checkpoint of which a file, or the whole folder, is not within what was given.

    Args:
        load: as the user gave it.
        folder: of the checkpoint that it means, the same or one in it.

    Raises:
        CheckpointError: says where the link leads to, and what to do.
    """
    if not folder.resolve().is_relative_to(load.resolve()):
        raise CheckpointError(
            f"{folder} is a link to {folder.resolve()}, outside of {load}: only what is in the "
            f"folder itself is read. If it is what you mean: --load {folder.resolve()}"
        )
    check_links(folder)


def check_is_inside(folder: Path, path: Path) -> None:
    """Refuse a file that a link brings in from outside of the folder.

    Raises:
        CheckpointError: says where it leads to, and what to do.
    """
    real, home = path.resolve(), folder.resolve()
    if any(real.is_relative_to(place) for place in (home, *_blobs(home))):
        return
    raise CheckpointError(
        f"{path} is a link to {real}, outside of {folder}: only files of the folder itself are "
        "read (and those of its own repository in the Hugging Face hub's cache). If the file "
        f"belongs to it, copy it there: cp -L {real} {path}"
    )


def _blobs(home: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot."""
    for parent in home.parents:
        if parent.name.startswith(_REPOSITORY) and home.is_relative_to(parent / "snapshots"):
            return [(parent / "blobs").resolve()]
    return []
