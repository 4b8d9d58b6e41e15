"""Neither saving nor loading gathers a table's optimizer states on a rank: what a process grows by
is of its own shard's size.

`python -m tests.training.checkpoint.test_peak_memory 9` prints the figures for a larger table, here
of 2**(2 * 9) rows.
"""

import dataclasses
import functools
import sys
import tempfile
from pathlib import Path

import torch
from megatron.core.optimizer import ChainedOptimizer

from megatron_memory.config import Config
from megatron_memory.memory import table
from megatron_memory.optimizer import MemoryOptimizer
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training.checkpoint import finding, loader, saver, state
from megatron_memory.training.setup import TrainingSetup, build_training_setup
from tests.distributed import run_ranks
from tests.memory_growth import growth
from tests.tiny import VOCAB, tiny_config

RANKS, COLUMNS, STATES, FP32 = 4, 256, 3, 4
MIB = 2**20


@dataclasses.dataclass
class Growth:
    """Bytes by which one rank's memory grows, at most, during a call."""

    save: int
    load: int


def _config(log_half_keys: int, folder: Path) -> Config:
    config = tiny_config(
        "memory+",
        parallel={"device": "cpu", "use_distributed_optimizer": True},
        memory={"num_half_keys": 2**log_half_keys, "value_dim": COLUMNS},
    )
    checkpoint = dataclasses.replace(config.checkpoint, save=str(folder), load=str(folder))
    return dataclasses.replace(config, checkpoint=checkpoint)


def measure(log_half_keys: int, folder: Path, gathers: bool = False) -> Growth:
    """Save and load on this rank. `gathers`: in megatron-core's own way."""
    config, backend = _config(log_half_keys, folder), select_backend("cpu")
    initialize_distributed(config, backend)
    if gathers:
        for method in ("sharded_state_dict", "load_state_dict"):
            setattr(MemoryOptimizer, method, getattr(ChainedOptimizer, method))
    # As large tables have them: a chunk for each rank to write.
    table.MAX_CHUNK_ELEMENTS = 2 ** (2 * log_half_keys) * COLUMNS // RANKS
    setup = build_training_setup(config, backend, padded_vocab_size=VOCAB)
    _step(setup)
    writer = saver.CheckpointSaver(setup, VOCAB)
    save = growth(functools.partial(writer.save, state.Position(iteration=1)))
    found = finding.find_start(config, VOCAB, notify=_ignore)
    assert found is not None
    load = growth(functools.partial(loader.load_checkpoint, setup, found, notify=_ignore))
    return Growth(save=save, load=load)


def _step(setup: TrainingSetup) -> None:
    """Makes the optimizers' states."""
    setup.scheduler.step(setup.config.training.global_batch_size)
    setup.optimizer.step()


def _ignore(line: str) -> None:
    pass


def test_no_rank_holds_another_ones_shard(tmp_path: Path):
    """Of a table of 64 MiB, whose states are 192 MiB; the shard of each rank is 48 MiB of them.

    Saving copies the shard, and one of the chunks of weights for the writer: 64 MiB. Loading reads
    a rectangle of a shard at a time, at most 16 MiB. 24 MiB are for everything else.
    """
    log_half_keys = 8
    shard = 2 ** (2 * log_half_keys) * COLUMNS * FP32 // RANKS
    for rank in run_ranks(measure, RANKS, log_half_keys, tmp_path):
        assert rank.save < (STATES + 1) * shard + 24 * MIB
        assert rank.load < shard + 24 * MIB


def _report(log_half_keys: int) -> None:
    table_size = 2 ** (2 * log_half_keys) * COLUMNS * FP32
    print(f"table {table_size / MIB:.0f} MiB, its states three times as much, on {RANKS} ranks")
    for gathers in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_ranks(measure, RANKS, log_half_keys, Path(folder), gathers, timeout=600)
        for call in ("save", "load"):
            grown = [round(getattr(rank, call) / MIB) for rank in ranks]
            print(f"{'gathered' if gathers else 'by shards'}: {call} grows ranks by {grown} MiB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _report(int(sys.argv[1]))
