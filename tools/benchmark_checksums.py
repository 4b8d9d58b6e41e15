"""What checksums cost: saves and loads with and without them, in turn, and the hash's own speed.

    python tools/benchmark.py checksums
    torchrun --nproc-per-node 2 tools/benchmark.py checksums

Each round saves and loads one model twice, with sums and without, the order changing from round to
round; a round's ratio is of these two. Before a load the files are dropped from the page cache
where --cold is given, so that it reads the disk.
"""

import argparse
import dataclasses
import itertools
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_WAYS = ("xxh3_128", "none")
_ITERATION = 1


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py checksums",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--num-half-keys", type=int, default=512, help="the table has the square")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="loads read the disk")
    parser.add_argument("--folder", help="where to save; default: a temporary folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        _run(args, folder)
    return 0


def _run(args: argparse.Namespace, folder: str) -> None:
    from megatron_memory.runtime import prepare_megatron

    backend = prepare_megatron()
    import torch

    from megatron_memory.runtime.distributed import initialize_distributed, shutdown_distributed
    from megatron_memory.training.setup import build_training_setup

    config = _config(args.num_half_keys)
    initialize_distributed(config, backend)
    names = [folder]
    torch.distributed.broadcast_object_list(names, src=0)
    setup = build_training_setup(config, backend, 4096)
    setup.optimizer.step()
    benchmark = _Benchmark(setup, Path(names[0]), cold=args.cold)
    rounds = []
    for number in range(args.rounds + 1):
        order = _WAYS if number % 2 else _WAYS[::-1]
        rounds.append({way: benchmark.measure(way) for way in order})
    if torch.distributed.get_rank() == 0:
        _report(rounds[1:], benchmark.num_bytes, args)
    torch.distributed.barrier()
    shutdown_distributed()


def _config(num_half_keys: int):
    from megatron_memory.config import (
        Config,
        MemoryConfig,
        ModelConfig,
        OptimizerSettings,
        TrainingConfig,
    )

    return Config(
        model=ModelConfig(
            num_layers=4,
            hidden_size=256,
            ffn_hidden_size=704,
            num_attention_heads=4,
            seq_length=128,
            position_embedding_type="rope",
            normalization="RMSNorm",
            swiglu=True,
            disable_bias_linear=True,
        ),
        memory=MemoryConfig(layers="centered:2:2", num_half_keys=num_half_keys),
        optimizer=OptimizerSettings(lr=1e-4),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=8, train_iters=1000),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one save or load, on one rank."""

    wall: float
    """Seconds of the clock."""
    cpu: float
    """Seconds of processors: comparable on a machine that others use, too."""


class _Benchmark:
    """Saves and loads one model."""

    def __init__(self, setup, root: Path, *, cold: bool):
        self._setup, self._root, self._cold = setup, root, cold
        self.num_bytes = 0

    def measure(self, way: str) -> dict[str, Cost]:
        """A save in the foreground, what one in the background keeps the training waiting, and a
        load."""
        return {
            "save": self._save(way, in_background=False),
            "background save, waiting": self._save(way, in_background=True),
            "load": self._load(way),
        }

    def _with(self, **checkpoint):
        config = self._setup.config
        changed = dataclasses.replace(config.checkpoint, **checkpoint)
        config = dataclasses.replace(config, checkpoint=changed)
        return dataclasses.replace(self._setup, config=config)

    def _folder(self, way: str) -> Path:
        return self._root / way

    def _save(self, way: str, *, in_background: bool) -> Cost:
        import torch

        from megatron_memory.training.checkpoint.saver import CheckpointSaver
        from megatron_memory.training.checkpoint.state import Position

        if torch.distributed.get_rank() == 0:
            shutil.rmtree(self._folder(way), ignore_errors=True)
            os.sync()
        torch.distributed.barrier()
        setup = self._with(save=str(self._folder(way)), checksums=way, async_save=in_background)
        saver = CheckpointSaver(setup, 4096)
        position = Position(iteration=_ITERATION, consumed_samples=8)
        cost = _timed(lambda: saver.save(position))
        saver.finish()
        return cost

    def _load(self, way: str) -> Cost:
        from megatron_memory.training.checkpoint.finding import find_start
        from megatron_memory.training.checkpoint.loader import load_checkpoint

        files = list(self._folder(way).glob("iter_*/*"))
        self.num_bytes = sum(file.stat().st_size for file in files)
        for file in files if self._cold else ():
            with open(file, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        setup = self._with(load=str(self._folder(way)), checksums=way)

        def load() -> None:
            found = find_start(setup.config, 4096, lambda line: None)
            assert found is not None, "it was saved"
            load_checkpoint(setup, found, lambda line: None)

        return _timed(load)


def _timed(function: Callable[[], object]) -> Cost:
    import torch

    torch.distributed.barrier()
    began, cpu = time.perf_counter(), _cpu_seconds()
    function()
    used = _cpu_seconds() - cpu
    torch.distributed.barrier()
    return Cost(wall=time.perf_counter() - began, cpu=used)


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for: writers of checkpoints."""
    usages = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _report(rounds: list[dict[str, dict[str, Cost]]], num_bytes: int, args) -> None:
    import torch

    ranks, cores = torch.distributed.get_world_size(), os.cpu_count()
    cache = "cold" if args.cold else "warm"
    print(f"{num_bytes / 1e6:,.0f} MB, {ranks} ranks on {cores} cores, {cache} page cache")
    print(f"{'':31}{'with sums':>12}{'without':>12}{'ratio':>9}   round by round")
    for what, kind in itertools.product(rounds[0]["none"], ("wall", "cpu")):
        pairs = [[getattr(measured[way][what], kind) for way in _WAYS] for measured in rounds]
        ratios = [with_sums / without for with_sums, without in pairs]
        print(
            f"{what + ', ' + kind:31}"
            + "".join(f"{1e3 * statistics.median(c):9.0f} ms" for c in zip(*pairs, strict=True))
            + f"{statistics.median(ratios):9.3f}   "
            + ", ".join(f"{ratio:.2f}" for ratio in ratios)
        )
    from megatron_memory.training.checkpoint.checksums import ALGORITHMS

    data = os.urandom(1 << 26)
    for name, algorithm in ALGORITHMS.items():
        began = time.perf_counter()
        for _ in range(4):
            algorithm.new().update(data)
        speed = 4 * len(data) / (time.perf_counter() - began) / 1e9
        print(
            f"{name}: {speed:.1f} GB/s of memory by one core, the limit of what sums can cost less"
        )
