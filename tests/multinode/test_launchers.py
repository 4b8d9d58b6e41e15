"""The launchers and layouts of examples/multinode, with torchrun and Slurm played by scripts."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_memory.train import main
from tests.multinode.training import LAUNCHER, REPOSITORY

pytestmark = pytest.mark.multinode

EXAMPLES = LAUNCHER.parent
SBATCH = EXAMPLES / "slurm.sbatch"

TORCHRUN = f"""#!{sys.executable}
# Tells its arguments; with WORKER set, waits for a worker that ends well on SIGUSR1.
import os, subprocess, sys
shown = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
words = sys.argv[1:] + [f"{{name}}={{os.environ.get(name)}}" for name in shown]
os.write(1, (" ".join(words) + "\\n").encode())  # at once: several nodes write
if "WORKER" in os.environ:
    sys.exit(subprocess.call([sys.executable, "-c", os.environ["WORKER"]]))
sys.exit(int(os.environ.get("CODE", "0")))
"""
WORKER = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: (print("saved", flush=True), sys.exit(0)))
print("training", flush=True)
time.sleep(60)
sys.exit(1)
"""
SRUN = f"""#!{sys.executable}
# Starts the command on the first node and the last, and passes signals on, as srun does.
import os, signal, subprocess, sys
print("srun", *sys.argv[1:], flush=True)
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word.endswith(".sh")):]
nodes = sorted({{0, int(os.environ["SLURM_JOB_NUM_NODES"]) - 1}})
tasks = [
    subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node)}}) for node in nodes
]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then seq -f 'node%g' "$SLURM_JOB_NUM_NODES"; else echo "scontrol $*"; fi
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With the players on PATH, and nothing that a surrounding torchrun or Slurm left."""
    for name, text in {"torchrun": TORCHRUN, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "NCCL", "GLOO"))}
    return inherited | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("script", [LAUNCHER, SBATCH], ids=lambda path: path.name)
def test_scripts_are_bash(script: Path):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(LAUNCHER, os.X_OK)


@pytest.mark.parametrize("nodes", [1, 2, 8, 64])
def test_layouts_are_legal_for_their_nodes(nodes: int, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(8 * nodes))
    config = EXAMPLES / f"nodes{nodes}.yaml"
    tokens = ["--tokenizer-type", "none", "--vocab-size", "128256"]
    assert main(["--config", str(config), *tokens, "--save", "run", "--dry-run"]) == 0
    described = capsys.readouterr().out
    assert f"Placement: {8 * nodes} ranks = " in described
    # What the head of the file says of it.
    values = config.read_text().split(" values.")[0].split()[-1]
    assert f"{values} rows of " in described
    memory = next(line for line in described.splitlines() if line.startswith("Memory on each"))
    assert float(memory.split(" GiB")[0].split()[-1]) < 72, "80 GB are 74.5 GiB, with the allocator"


@pytest.mark.parametrize(("nodes", "rank"), [(1, None), (2, 0), (8, 7), (64, 63)])
def test_torchrun_gets_the_nodes(nodes: int, rank: int | None, environment):
    environment |= {"NUM_NODES": str(nodes), "NETWORK_DEVICE": "eth7", "GLOO_SOCKET_IFNAME": "eth1"}
    if rank is not None:
        environment |= {"NODE_RANK": str(rank), "MASTER": "node0"}
    done = _run([str(LAUNCHER), "--config", "a file.yaml", "--bf16"], environment)
    assert done.returncode == 0, done.stderr
    master = "localhost" if rank is None else "node0"
    for expected in (
        f"--nnodes {nodes} --nproc-per-node gpu --max-restarts 3 --rdzv-backend c10d ",
        f"--rdzv-endpoint {master}:29400 --rdzv-id megatron-memory ",
        f"--rdzv-conf is_host={int(not rank)} -m megatron_memory.train ",
        "-m megatron_memory.train --config a file.yaml --bf16 ",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 NCCL_SOCKET_IFNAME=eth7 GLOO_SOCKET_IFNAME=eth1",
    ):
        assert expected in done.stdout


@pytest.mark.parametrize("missing", ["NODE_RANK", "MASTER"])
def test_nodes_without_number_or_master_are_refused(missing: str, environment):
    environment |= {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER": "node0"}
    del environment[missing]
    done = _run([str(LAUNCHER)], environment)
    assert done.returncode != 0 and f"{missing} is not set" in done.stderr and not done.stdout


def test_torchruns_exit_code_is_the_launchers(environment):
    assert _run([str(LAUNCHER)], environment | {"CODE": "5"}).returncode == 5


@pytest.mark.parametrize("nodes", [1, 2, 8, 64])
def test_slurm_starts_a_launcher_on_every_node(nodes: int, environment):
    environment |= _job(nodes)
    done = _run(["bash", str(SBATCH), "--config", "file.yaml"], environment)
    assert done.returncode == 0, done.stderr
    assert "srun --ntasks-per-node 1 --kill-on-bad-exit=1 " in done.stdout
    started = [line for line in done.stdout.splitlines() if "-m megatron_memory.train" in line]
    assert len(started) == min(nodes, 2)
    assert sum("is_host=1" in line for line in started) == 1
    for line in started:
        assert f"--nnodes {nodes} " in line and "--rdzv-endpoint node1:24321 " in line
        assert "--rdzv-id 4321 " in line and "--config file.yaml" in line
    assert "requeue" not in done.stdout


def _job(nodes: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
    }


def test_a_failed_step_is_the_jobs_exit_code(environment):
    done = _run(["bash", str(SBATCH)], environment | _job(2) | {"CODE": "7"})
    assert done.returncode == 7 and "requeue" not in done.stdout


@pytest.mark.parametrize("kind", ["torchrun.sh", "slurm.sbatch"])
def test_sigusr1_reaches_the_processes_and_ends_well(kind: str, environment, tmp_path: Path):
    """Slurm's own way: a signal to the batch script, some time before the limit."""
    output = tmp_path / "output"
    environment |= {"WORKER": WORKER} | (_job(2) if kind == "slurm.sbatch" else {})
    workers = 2 if kind == "slurm.sbatch" else 1
    with open(output, "w") as file:
        process = subprocess.Popen(
            ["bash", str(EXAMPLES / kind)], cwd=REPOSITORY, env=environment, stdout=file
        )
    try:
        deadline = time.monotonic() + 30
        while output.read_text().count("training") < workers:
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
    said = output.read_text()
    assert said.splitlines().count("saved") == workers
    assert ("scontrol requeue 4321" in said) == (kind == "slurm.sbatch")
