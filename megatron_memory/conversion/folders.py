"""Output folders that appear only when they are complete."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.checksums import SUMS_FILE


@contextlib.contextmanager
def output_folder(save: Path, load: Path | None = None) -> Iterator[Path]:
    """A folder beside `save` to write into, which takes its name at the end; removed on errors.

    Args:
        save: the folder's name.
        load: what is read, which stays as it is.

    Raises:
        CheckpointError: `save` holds something, or lies in `load`, or another process has written
            it meanwhile, or the disk is full.
    """
    try:
        _check_is_free(save)
    except OSError as error:
        raise CheckpointError(f"--save {save}: cannot be written: {error.strerror}") from error
    if load is not None and save.resolve().is_relative_to(load.resolve()):
        raise CheckpointError(
            f"--save {save}: lies in --load {load}, whose files are only read. Name a folder "
            "outside of it"
        )
    # Processes on other hosts, and the one that was killed here before, may have the same number.
    temporary = save.with_name(f".{save.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        _rename(temporary, save)
    except OSError as error:
        if _is_elsewhere(error.filename, temporary, save):
            raise CheckpointError(
                f"{error.filename!s:.200}: {error.strerror}. Check the path, its owner and its "
                "permissions"
            ) from error
        raise CheckpointError(f"--save {save}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_elsewhere(name: Any, *places: Path) -> bool:
    """Whether an error is known to be of a file that is none of the output's."""
    return isinstance(name, str) and not any(
        Path(name).is_relative_to(place) or Path(place).is_relative_to(name) for place in places
    )


def _check_is_free(save: Path) -> None:
    if save.name in ("", ".."):
        raise CheckpointError(f"--save {save}: is no name of a folder. Name a new one")
    if save.is_symlink():
        raise CheckpointError(
            f"--save {save}: is a symbolic link, which a folder cannot replace. Name a new folder"
        )
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise CheckpointError(
            f"--save {save}: is there already, and is not empty. Name a new folder, or remove it"
        )
    for parent in save.resolve().parents:
        if (parent / SUMS_FILE).is_file():
            raise CheckpointError(
                f"--save {save}: lies in the checkpoint {parent}, which would then have a file "
                "that is not its own. Name a folder elsewhere"
            )


def _rename(temporary: Path, save: Path) -> None:
    try:
        # Replaces an empty folder, and fails where another process filled it meanwhile.
        os.rename(temporary, save)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointError(
                f"--save {save}: another program has written there meanwhile; its files are kept"
            ) from error
        raise


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
