"""A run whose checkpoint the other line of megatron-core loads.

    python -m tests.upstream.saved_run

writes tests/upstream/checkpoints/LINE.zip with the installed line, in a folder that it leaves.
"""

import os
import tempfile
import zipfile
from pathlib import Path

from megatron_memory.config import Config
from megatron_memory.upstream import LINE
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, runs, tiny_config, write_dataset

CHECKPOINTS = Path(__file__).with_name("checkpoints")
SAVED, LAST = 2, 5
"""Iterations: of the checkpoint, and the last one."""


def config_of(data: Path, **checkpoint: object) -> Config:
    """Small, with a distributed optimizer's states."""
    config = tiny_config(
        write_dataset(data),
        model={"hidden_size": 16, "ffn_hidden_size": 32},
        memory=dict(layers="1", num_heads=2, top_k=2, num_half_keys=4),
        checkpoint=checkpoint,
    )
    config = change(config, "parallel", use_distributed_optimizer=True)
    return change(config, "training", exit_interval=LAST)


def _write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Paths in the checkpoint are relative to it.
        os.chdir(folder)
        Path("data").mkdir()
        config = config_of(Path("data"), save="saved")
        run_ranks(runs, 1, [change(config, "training", exit_interval=SAVED)])
        with zipfile.ZipFile(CHECKPOINTS / f"{LINE}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path("saved").rglob("*")):
                if path.is_file() and path.name != "writer.json":
                    archive.write(path)
        os.chdir("/")


if __name__ == "__main__":
    _write()
