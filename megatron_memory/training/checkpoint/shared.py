"""Do all ranks see the same checkpoints? Nodes have disks of their own, and some share one.

A checkpoint saved to folders that nodes do not share is in pieces on several machines, and looks
complete to each of them; so this is asked before the training.
"""

import contextlib
import hashlib
import os
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.agreement import ask_first_rank, raise_on_all
from megatron_memory.training.checkpoint.integrity import check_whole
from megatron_memory.training.checkpoint.metadata_file import METADATA_FILE

_SECONDS_TO_APPEAR = 5
"""That a network file system may take to show a new file on another node."""


def check_save_is_shared(root: Path) -> None:
    """That `--save` is one folder for all ranks; a collective call.

    Rank 0 makes the folder where it is missing, and a file in it, which the others look for.

    Raises:
        CheckpointError: on every rank, where one does not see the file, or rank 0 cannot write.
    """
    if dist.get_world_size() == 1:
        return
    name, host = ask_first_rank(lambda: (_write_token(root), socket.gethostname()))
    try:
        problem = None
        if not _appears(root / name):
            problem = (
                f"--save {root} is not shared: rank {dist.get_rank()} on {socket.gethostname()} "
                f"does not see what rank 0 on {host} writes there, and a checkpoint needs the "
                "parts of all ranks. Give a folder on a file system that every node mounts under "
                "this path"
            )
        raise_on_all(problem)
    finally:
        if dist.get_rank() == 0:
            (root / name).unlink(missing_ok=True)


def _write_token(root: Path) -> str:
    name = f".seen-by-all-ranks.{uuid.uuid4().hex}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    except OSError as error:
        raise CheckpointError(
            f"--save {root}: {error.strerror}: {error.filename}. Give a folder that can be written "
            "to"
        ) from error
    return name


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_TO_APPEAR
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        # NFS remembers for a minute that a folder was not there, unless one asks for the list.
        for folder in (path.parent.parent, path.parent):
            with contextlib.suppress(OSError):
                os.listdir(folder)
        time.sleep(0.1)
    return True


def check_load_is_alike(folder: Path) -> None:
    """That every rank finds the checkpoint that rank 0 has checked: shared, or a copy of it.

    A collective call.

    Raises:
        CheckpointError: on every rank, where one finds none, another, or a part of it.
    """
    if dist.get_world_size() == 1:
        return
    expected = ask_first_rank(lambda: _digest(folder))
    raise_on_all(_problem_with_copy(folder, expected))


def _problem_with_copy(folder: Path, expected: str) -> str | None:
    where = (
        f"--load: {folder}, which rank 0 found, rank {dist.get_rank()} on {socket.gethostname()}"
    )
    fix = "Give a folder that every node mounts under this path, or copy the checkpoint to each"
    try:
        if _digest(folder) != expected:
            return f"{where} sees as another checkpoint. {fix}"
        # The ranks of a node see the same files: one of them looks at all.
        if os.environ.get("LOCAL_RANK") == "0" and dist.get_rank() > 0:
            check_whole(folder)
    except FileNotFoundError:
        return f"{where} does not see. {fix}"
    except (CheckpointError, OSError) as error:
        return f"{where} cannot load: {error}. {fix}"
    return None


def _digest(folder: Path) -> str:
    """Of the checkpoint's list of tensors, which names every file that holds one."""
    return hashlib.sha256((folder / METADATA_FILE).read_bytes()).hexdigest()
