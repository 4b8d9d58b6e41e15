"""500 random damages to checkpoint files: none is silent.

`SOAK=1 python -m pytest tests/soak/test_damaged_checkpoints.py -s` prints what was counted.
"""

import collections
import dataclasses
import random
import shutil
from pathlib import Path

import pytest

from megatron_memory.config import Config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.runtime import select_backend
from megatron_memory.training.checkpoint.finding import find_start
from megatron_memory.training.checkpoint.loader import load_checkpoint
from megatron_memory.training.setup import build_training_setup
from tests.distributed import run_ranks
from tests.soak.rounds import rounds
from tests.tiny import one_rank  # noqa: F401
from tests.training.checkpoint.damages import damage
from tests.training.tiny_runs import VOCAB, change, runs, tiny_config, write_dataset


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Checkpoints of iterations 2 and 4 by two ranks, and a configuration that loads them."""
    folder = tmp_path_factory.mktemp("written")
    prefix = write_dataset(tmp_path_factory.mktemp("data"))
    config = tiny_config(prefix, checkpoint={"save": str(folder), "save_interval": 2})
    run_ranks(runs, 2, [change(config, "training", train_iters=4)])
    return config, folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.usefixtures("one_rank")
def test_no_damage_is_silent(written: tuple[Config, Path], tmp_path: Path):
    config, original = written
    setup = build_training_setup(config, select_backend("cpu"), VOCAB)
    contents = {i: _contents(original / f"iter_{i:07d}") for i in (2, 4)}
    chance, counted = random.Random(11), collections.Counter[str]()
    for number in range(rounds(500)):
        root = tmp_path / str(number)
        shutil.copytree(original, root)
        done = damage(root / "iter_0000004", chance)
        older_too = chance.random() < 0.1 and damage(root / "iter_0000002", chance)
        said: list[str] = []
        try:
            changed = change(config, "checkpoint", load=str(root))
            found = find_start(changed, VOCAB, said.append)
            load_checkpoint(dataclasses.replace(setup, config=changed), found, said.append)
        except CheckpointError as error:
            message = str(error)
            assert str(root / "iter_0000004") in message, (done, message)
            whole = not older_too or _contents(root / "iter_0000002") == contents[2]
            offered = f"Complete is iteration 2: --load {root / 'iter_0000002'}" in message
            assert offered == whole, (done, older_too, message)
            counted[f"{done.split()[0]} refused"] += 1
        else:
            assert _contents(root / "iter_0000004") == contents[4], f"silent: {done}"
            counted[f"{done.split()[0]} that changed nothing"] += 1
        shutil.rmtree(root)
    print(f"\n{sum(counted.values())} damages, 0 silent: {dict(sorted(counted.items()))}")
    assert sum(counted[f"{kind} refused"] for kind in ("flip", "swap", "delete")) > 20
