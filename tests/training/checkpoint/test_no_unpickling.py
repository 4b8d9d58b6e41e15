"""No file is unpickled: Python says so itself.

Its unpicklers, in C and in Python, announce each name that a pickle asks for to `sys.addaudithook`.
Messages between the processes of a run are pickles too, and are told apart by who reads them.
"""

import datetime
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_memory.config import Config
from megatron_memory.conversion.convert import convert
from megatron_memory.inference.options import Sampling
from megatron_memory.inspection.options import Inspection, Output, Subject
from megatron_memory.inspection.program import inspect
from tests.conversion.states import conversion, golden_checkpoint
from tests.distributed import run_ranks
from tests.inference import saved_models
from tests.training.tiny_runs import change, run, tiny_config

# Who reads messages of processes of our own.
_OF_MESSAGES = (
    ("torch/distributed/distributed_c10d.py", "_tensor_to_object"),
    ("multiprocessing/connection.py", "recv"),
    ("multiprocessing/queues.py", "get"),
    ("checkpoint/writer_queue.py", "get_nowait"),
)


def _is_message() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        for file, name in _OF_MESSAGES:
            if code.co_filename.endswith(file) and code.co_name == name:
                return True
        frame = frame.f_back
    return False


def _watched(config: Config, folder: Path) -> tuple[list[str], list[str]]:
    """Everything that reads a checkpoint; returns the names that files asked for, and that a file
    of this test did."""
    asked: list[str] = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "pickle.find_class" and not _is_message():
            asked.append(".".join(map(str, arguments)))

    sys.addaudithook(watch)
    save = Path(config.checkpoint.save)
    run(config)
    run(change(change(config, "training", train_iters=6), "checkpoint", load=str(save)))
    model = saved_models.tiny_config(folder / "model")
    saved_models.save_model(model)
    generator = saved_models.load(folder / "model")
    assert generator.generate(["3 1 4"], Sampling(greedy=True, num_tokens_to_generate=2))
    parallel_state.destroy_model_parallel()
    # A conversion is a program of one process, that makes groups of its own.
    torch.distributed.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    for number, (source, load, target) in enumerate(
        [
            ("megatron", save, "megatron"),
            ("megatron", save, "hf"),
            ("lingua", golden_checkpoint("peer"), "megatron"),
            ("lingua", golden_checkpoint("memory_plus"), "hf"),
        ]
    ):
        out = folder / f"{number}"
        convert(conversion(source, load, target, out, verify=True), lambda text: None)
        assert (
            inspect(Inspection(subject=Subject(load=str(out)), output=Output()), lambda text: None)
            == 0
        )
    of_files, asked[:] = list(asked), []
    pickle.loads(pickle.dumps(datetime.date(2024, 1, 1)))
    return of_files, asked


@pytest.mark.distributed
def test_no_file_is_unpickled(dataset: str, tmp_path: Path):
    config = tiny_config(
        dataset,
        checkpoint={"save": str(tmp_path / "save"), "save_interval": 2},
        training={"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 4, "eval_iters": 1},
    )
    ((of_files, of_this_test),) = run_ranks(_watched, 1, config, tmp_path)
    assert of_files == []
    assert of_this_test == ["datetime.date"]


def test_torch_would_unpickle():
    """That what is replaced does what it is replaced for: else this page tests nothing."""
    from torch.distributed.checkpoint import FileSystemReader

    asked: list[str] = []
    load = pickle.load
    pickle.load = lambda stream: asked.append("load") or load(stream)
    try:
        FileSystemReader(golden_checkpoint("peer")).read_metadata()
    finally:
        pickle.load = load
    assert asked
