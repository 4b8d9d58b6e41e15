"""The program as users start it: errors before any training, exit codes, torchrun and signals."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_memory.train import main
from megatron_memory.training.checkpoint import folders
from tests.training.tiny_runs import SEQUENCE, VOCAB

REPOSITORY = Path(__file__).parents[2]


def _flags(dataset: str, **changes: str | int | None) -> list[str]:
    flags: dict[str, str | int | None] = {
        "num-layers": 2,
        "hidden-size": 32,
        "num-attention-heads": 4,
        "seq-length": SEQUENCE,
        "position-embedding-type": "rope",
        "memory-layers": "1",
        "memory-num-heads": 2,
        "memory-top-k": 4,
        "memory-num-half-keys": 8,
        "micro-batch-size": 2,
        "global-batch-size": 8,
        "train-iters": 4,
        "eval-iters": 0,
        "log-interval": 1,
        "lr": 0.01,
        "vocab-size": VOCAB,
        "make-vocab-size-divisible-by": 1,
        "data-path": dataset,
        "split": "1,0,0",
        "data-cache-path": str(Path(dataset).parent / "cache"),
        "device": "cpu",
        "num-workers": 1,
    }
    flags |= {name.replace("_", "-"): value for name, value in changes.items()}
    given = [(f"--{name}", value) for name, value in flags.items() if value is not None]
    return [str(word) for pair in given for word in pair if word != ""]


BAD = {
    "unknown flag": ({"memory_top_kk": 4}, ["--memory-top-kk", "--memory-top-k"]),
    "layer out of range": ({"memory_layers": "2"}, ["--memory-layers 2", "--num-layers 2"]),
    "odd key dimension": ({"memory_key_dim": 7}, ["--memory-key-dim 7"]),
    "top-k above the half-keys": (
        {"memory_top_k": 9},
        ["--memory-top-k 9", "--memory-num-half-keys 8"],
    ),
    "batch": ({"global_batch_size": 7}, ["--global-batch-size 7", "--micro-batch-size 2"]),
    "world size": (
        {"tensor_model_parallel_size": 2},
        ["1 processes", "--tensor-model-parallel-size 2"],
    ),
    "missing dataset": ({"data_path": "/nowhere/data"}, ["/nowhere/data", ".bin"]),
    "too few samples": ({"seq_length": 5000}, ["--seq-length 5000", "0 samples", "32 samples"]),
    "missing checkpoint": (
        {"load": "/nowhere/run", "exit_on_missing_checkpoint": ""},
        ["--load /nowhere/run"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_message(case: str, dataset: str, capfd: pytest.CaptureFixture):
    changes, expected = BAD[case]
    process = _start(_flags(dataset, **changes))
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    message = errors.splitlines()[-1] if "\n  " not in errors else errors
    for text in expected:
        assert text in message
    assert "Traceback" not in errors and "iteration" not in output


def test_absent_gpu_and_columns_over_ranks(
    dataset: str, capsys: pytest.CaptureFixture, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(_flags(dataset, device="cuda")) == 2
    assert "--device cuda" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(_flags(dataset, tensor_model_parallel_size=4, memory_value_dim=30)) == 2
    message = capsys.readouterr().err
    assert "--memory-value-dim 30" in message and "--tensor-model-parallel-size 4" in message


def test_triton_on_the_cpu_is_refused_before_anything_starts(dataset: str, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(_flags(dataset, memory_kernels="triton")) == 2
    message = capsys.readouterr().err
    assert "ConfigurationError: --memory-kernels triton: " in message
    assert "Use auto or torch." in message
    assert not torch.distributed.is_initialized()


def test_other_ranks_wait_for_the_first_to_speak(dataset: str, capsys, monkeypatch):
    waited = []
    monkeypatch.setattr("megatron_memory.entry.time.sleep", waited.append)
    monkeypatch.setenv("RANK", "3")
    assert main(_flags(dataset, memory_layers="9")) == 2
    assert waited and capsys.readouterr().err.startswith("rank 3: ConfigurationError: ")


def _start(flags: list[str], ranks: int | None = None, **more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more
    program = [sys.executable, "-m"]
    if ranks is not None:
        program += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    return subprocess.Popen(
        [*program, "megatron_memory.train", *flags],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_an_illegal_layout_ends_every_rank(dataset: str):
    """Four processes without torchrun, which would end the others after the first. It takes
    seconds; the limit only tells that from a hang."""
    flags = _flags(dataset, num_layers=4, memory_layers="1,3", pipeline_model_parallel_size=2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    run = {"WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [_start(flags, RANK=str(rank), LOCAL_RANK=str(rank), **run) for rank in range(4)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 2
        assert "read one table" in errors and "--memory-share-scope stage" in errors


def _losses(output: str) -> dict[str, str]:
    lines = (line.split(" | ") for line in output.splitlines() if " | loss " in line)
    return {line[0]: line[1] for line in lines}


def test_torchrun_saves_and_goes_on(dataset: str, tmp_path: Path):
    flags = _flags(
        dataset, tensor_model_parallel_size=2, save=str(tmp_path / "save"), save_interval=2
    )
    whole = _start(flags, ranks=2)
    output, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    assert output.count("memory kernels: torch's operators on the CPU (--memory-kernels auto)") == 1
    again = _start([*flags, "--load", str(tmp_path / "save" / "iter_0000002")], ranks=2)
    resumed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    first, second = _losses(output), _losses(resumed)
    assert list(first) == [f"iteration {i}/4" for i in (1, 2, 3, 4)]
    assert second == {name: first[name] for name in list(first)[2:]}


def test_sigterm_to_every_process_saves_and_exits_with_143(dataset: str, tmp_path: Path):
    """As Slurm does it: the readers of data and the writers of checkpoints get the signal, too."""
    flags = _flags(dataset, train_iters=100000, save=str(tmp_path / "save"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_memory.train", *flags],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("iteration") and "3/100000" in line:
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 143, "".join(lines)
    assert "SIGTERM was received; saved" in lines[-1]
    saved = folders.read_tracker(tmp_path / "save")
    assert saved is not None and saved >= 3


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="looks children up in /proc")
def test_no_process_outlives_a_killed_training(dataset: str, tmp_path: Path):
    process = _start(_flags(dataset, train_iters=100000, save=str(tmp_path / "save")))
    for line in process.stdout:
        if line.startswith("iteration"):
            break
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    children = [int(pid) for pid in listed]
    assert children
    process.kill()
    process.wait()
    # Not communicate(): a child that lives on would hold the pipes open.
    for pipe in (process.stdout, process.stderr):
        pipe.close()
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.2)
    alive = [pid for pid in children if _alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive
