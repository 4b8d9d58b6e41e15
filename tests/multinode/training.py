"""The training program on two hosts, started as a user does: the launcher on each."""

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.multinode.hosts import DEVICE, Host, Program
from tests.training.tiny_runs import SEQUENCE, VOCAB

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = REPOSITORY / "examples" / "multinode" / "torchrun.sh"


def tiny_flags(dataset: str, **changes: object) -> list[str]:
    """A model of two layers, the second with a memory; a change to "" gives a switch."""
    flags: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": SEQUENCE,
        "position_embedding_type": "rope",
        "memory_layers": "1",
        "memory_num_heads": 2,
        "memory_top_k": 4,
        "memory_num_half_keys": 8,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 4,
        "eval_iters": 0,
        "log_interval": 1,
        "lr": 0.01,
        "vocab_size": VOCAB,
        "make_vocab_size_divisible_by": 1,
        "data_path": dataset,
        "split": "1,0,0",
        "data_cache_path": Path(dataset).parent / "cache",
        "device": "cpu",
        "num_workers": 0,
    }
    words = ((f"--{name.replace('_', '-')}", str(v)) for name, v in (flags | changes).items())
    return [word for pair in words for word in pair if word]


class Node:
    """One host's part of a run, with a working directory and a log of its own."""

    def __init__(self, hosts: tuple[Host, Host], rank: int, folder: Path):
        self.host = hosts[rank]
        self.folder = folder / self.host.name
        self.program: Program | None = None
        self._log = folder / f"{self.host.name}.log"
        self._variables = {
            "NUM_NODES": "2",
            "NODE_RANK": str(rank),
            "MASTER": hosts[0].address,
            "LOCAL_ADDRESS": self.host.address,
            "NETWORK_DEVICE": DEVICE,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")]),
        }

    def start(self, flags: list[str], *, before: str = "true", **variables: str) -> None:
        """Start the launcher; `before` is shell code that the host runs first."""
        self.program = self.host.start(
            [str(LAUNCHER), *flags],
            folder=self.folder,
            log=self._log,
            environment=self._variables | variables,
            before=before,
        )

    @property
    def log(self) -> str:
        """What its processes have said so far."""
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, seen: Callable[[str], bool], timeout: float) -> None:
        """Until the log is as told, while the program runs; `timeout` in seconds."""
        deadline = time.monotonic() + timeout
        while not seen(self.log):
            assert time.monotonic() < deadline, f"not within {timeout} s:\n{self.log}"
            assert self.program.is_running(), f"ended early:\n{self.log}"
            time.sleep(0.05)


def losses(log: str) -> list[tuple[int, str]]:
    """Iteration and loss of each report, in the order of the log."""
    return [(int(i), loss) for i, loss in re.findall(r"iteration +(\d+)/\d+ \| loss (\S+)", log)]
