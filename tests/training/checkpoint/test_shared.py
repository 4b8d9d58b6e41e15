"""Nodes that do not see the same checkpoints: every rank refuses, before the training."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import shared
from megatron_memory.training.checkpoint.metadata_file import METADATA_FILE
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, tiny_config


def _answers(check, folders_of_ranks: list[list[Path]]) -> list[str | None]:
    """For each case what this rank hears: the error, or None."""
    shared._SECONDS_TO_APPEAR = 0.3
    rank = int(os.environ["RANK"])
    answers: list[str | None] = []
    for folders in folders_of_ranks:
        try:
            check(folders[rank])
            answers.append(None)
        except CheckpointError as error:
            answers.append(str(error))
    return answers


def test_saving_to_one_folder_or_several(tmp_path: Path):
    ours, theirs, file = tmp_path / "new" / "ours", tmp_path / "theirs", tmp_path / "file"
    theirs.mkdir()
    file.touch()
    cases = [[ours, ours], [ours, theirs], [file / "below", theirs]]
    first, second = run_ranks(_answers, 2, shared.check_save_is_shared, cases)
    assert first == second
    assert first[0] is None
    assert first[1].startswith(f"--save {theirs} is not shared: rank 1 on ")
    assert first[2].startswith(f"--save {file / 'below'}: Not a directory: ")
    assert not list(ours.iterdir()) and not list(theirs.iterdir())


@pytest.fixture(scope="module")
def checkpoint(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two iterations on one rank."""
    root = tmp_path_factory.mktemp("checkpoint")
    config = change(tiny_config(dataset), "training", train_iters=2)
    run_ranks(run, 1, change(config, "checkpoint", save=str(root)))
    return root / "iter_0000002"


def test_loading_copies_and_what_is_none(checkpoint: Path, tmp_path: Path):
    names = ("copy", "other", "partial", "missing")
    copy, other, partial, missing = (tmp_path / name for name in names)
    for folder in (copy, other, partial):
        shutil.copytree(checkpoint, folder)
    with open(other / METADATA_FILE, "ab") as file:
        file.write(b"something else")
    next(partial.glob("*.distcp")).unlink()
    cases = [[checkpoint, folder] for folder in (checkpoint, copy, other, partial, missing)]
    first, second = run_ranks(_answers_on_nodes, 2, cases)
    assert first == second
    assert first[:2] == [None, None]
    assert "sees as another checkpoint" in first[2]
    assert "cannot load: " in first[3] and ".distcp is missing" in first[3]
    assert "does not see" in first[4]
    assert all("rank 1 on " in answer for answer in first[2:])


def _answers_on_nodes(folders_of_ranks: list[list[Path]]) -> list[str | None]:
    """As if each rank had a node of its own."""
    os.environ["LOCAL_RANK"] = "0"
    return _answers(shared.check_load_is_alike, folders_of_ranks)
