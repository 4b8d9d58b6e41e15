"""The Makefile's promises that need no installation to check."""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a `make test` around these tests exports.
OUTER_MAKE = {"ARGS", "BASE_PYTHONS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHON"}
OUTER_MAKE |= {"TESTS", "VENV"}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in OUTER_MAKE}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def fake_python(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_make_alone_lists_the_targets():
    listed = re.findall(r"make (\w+)", make().stdout)
    for target in ("setup", "quickstart", "test", "lint", "bench", "gpu"):
        assert target in listed


def test_an_environment_of_the_users_own_is_left_alone():
    for choice in ("PYTHON=python3", "VENV="):
        commands = make("-n", "test", choice).stdout
        assert commands.split()[:3] == ["python3", "-m", "pytest"]
        assert "pip" not in commands


def test_tests_get_a_second_triton_in_a_folder_of_its_own(tmp_path):
    commands = make("-n", "test", f"VENV={tmp_path}/none").stdout
    folder = f"{tmp_path}/none/second-triton"
    # Whatever an interrupted installation left is removed, and the stamp comes last.
    steps = (f"rm -rf {folder}\n", f"--target {folder} -r", f"touch {folder}/.ready", "-m pytest")
    places = [commands.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    assert commands.find(f"touch {tmp_path}/none/.ready") < places[0]


def test_gpu_installs_nothing(tmp_path):
    commands = make("-n", "gpu", f"VENV={tmp_path}/none").stdout
    assert "python3 tests/gpu/run_files.py" in commands
    assert "install" not in commands


def test_gpu_refuses_without_a_gpu(tmp_path):
    blind = fake_python(tmp_path, "exit 1")
    done = make("gpu", f"PYTHON={blind}")
    assert done.returncode != 0
    assert "no torch that sees a GPU" in done.stderr and "pytest" not in done.stdout


def test_gpu_measures_in_spite_of_a_failed_test_and_fails_in_the_end(tmp_path):
    python = fake_python(tmp_path, 'echo "ran $*"; case "$*" in *run_files*) exit 1;; esac')
    done = make("gpu", f"PYTHON={python}", "REFERENCE=there")
    ran = re.findall(r"^ran (?:-m )?(\S+)", done.stdout, re.MULTILINE)
    steps = ["tests/gpu/run_files.py", "kernels/benchmarks/run.py", "tools/benchmark.py"]
    assert ran[1:] == steps
    assert "run.py all --reference there" in done.stdout
    assert done.returncode != 0 and "a test or a benchmark failed" in done.stderr
    python.write_text(python.read_text().replace("exit 1", "exit 0"))
    assert make("gpu", f"PYTHON={python}").returncode == 0


def test_setup_says_when_no_python_fits(tmp_path):
    done = make("setup", f"VENV={tmp_path}/new", f"BASE_PYTHONS={fake_python(tmp_path, 'exit 1')}")
    assert done.returncode != 0 and not (tmp_path / "new").exists()
    assert "found no Python 3.10 to 3.13" in done.stderr and "BASE_PYTHONS=" in done.stderr


def test_setup_says_when_the_venv_module_is_missing(tmp_path):
    # Debian's python3 without python3-venv: everything runs but `import ensurepip`.
    debian = fake_python(
        tmp_path, 'case "$2" in *ensurepip*) exit 1;; *print*) echo 3.11;; *) exit 0;; esac'
    )
    done = make("setup", f"VENV={tmp_path}/new", f"BASE_PYTHONS={debian}")
    assert done.returncode != 0 and not (tmp_path / "new").exists()
    assert "sudo apt install python3.11-venv" in done.stderr


def test_setup_never_empties_a_folder_that_is_no_environment(tmp_path):
    (tmp_path / "precious").write_text("mine")
    done = make("setup", f"VENV={tmp_path}")
    assert done.returncode != 0 and "is no Python environment" in done.stderr
    assert (tmp_path / "precious").read_text() == "mine"


def test_ci_runs_the_readmes_test_command():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "make" in line]
    assert commands == ["exec make test"]
    assert os.access(ROOT / ".ci/run", os.X_OK)
