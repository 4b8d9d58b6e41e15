"""Every kernel that ships, compiled for sm_90 and sm_80 under two Tritons, without a GPU.

In processes of their own: tests run kernels in Triton's interpreter, and the interpreter leaves
nothing to compile.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton has packages for Linux alone")

from benchmarks.compiled.cubin import warps_of_multiprocessor, width  # noqa: E402
from benchmarks.compiled.launches import kernels_without_launch  # noqa: E402
from benchmarks.compiled.shipped import shipped  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "kernels/benchmarks/compile_report.py"
SECOND_TRITON = Path(sys.prefix) / "second-triton"  # The Makefile installs it.


def version_in(file: str) -> str:
    pin = re.search(r"^triton==([\d.]+)", (ROOT / file).read_text(), re.MULTILINE)
    assert pin, f"{file} pins no triton"
    return pin[1]


VERSIONS = [
    version_in("requirements.txt"),
    version_in("kernels/benchmarks/compiled/second-triton.txt"),
]


def run(*command: str | Path, triton_folder: Path | None = None) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = [triton_folder] if triton_folder else []
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*folders, ROOT / "kernels"]))
    return subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
    )


def folder_of(version: str) -> Path | None:
    """Where a Triton lies that is not the environment's own; skips the test if it is nowhere."""
    if triton.__version__ == version:
        return None
    if (SECOND_TRITON / f"triton-{version}.dist-info").is_dir():
        return SECOND_TRITON
    pytest.skip(
        f"triton {version} is not installed; make test installs the second Triton, or: "
        f"pip install --no-deps --target {SECOND_TRITON} triton=={version}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_compile_within_their_limits(version, capsys):
    report = run(REPORT, "--triton", version, triton_folder=folder_of(version))
    with capsys.disabled():
        print(f"\n{report.stdout}")
    assert report.returncode == 0, report.stdout[report.stdout.find("WRONG") :] + report.stderr
    assert re.search(r"^[1-9]\d* compiled .* 0 problems$", report.stdout, re.MULTILINE)


def test_each_kernel_is_in_a_main_launch():
    assert not kernels_without_launch(shipped(), main=True)


def test_a_forgotten_kernel_is_named():
    others = [one for one in shipped() if not one.name.startswith("bag_sum")]
    forgotten = kernels_without_launch(others)
    assert forgotten == ["memory_kernels.bag.triton_forward.bag_sum_kernel"]


def test_rows_at_odd_addresses_are_found():
    program = """
import dataclasses, json
from benchmarks.compiled.limits import flaws
from benchmarks.compiled.offline import measure
from benchmarks.compiled.shipped import shipped
launch = next(one.launch for one in shipped() if one.name == "bag_sum D=1024 bf16")
for stride in (1024, 1025):
    arguments = {**launch.arguments, "row_stride": stride}
    resources = measure(dataclasses.replace(launch, arguments=arguments), 90)
    print(json.dumps([resources.wide_loads, flaws(resources, wide=True)]))
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    (even_loads, even_flaws), (odd_loads, odd_flaws) = map(json.loads, done.stdout.splitlines())
    # A tile of 8 rows is 8 loads of 16 bytes a thread; what is left belongs to indices and weights.
    assert even_loads >= 8 and not even_flaws
    assert odd_loads == even_loads - 8
    assert len(odd_flaws) == 1 and "16-byte loads" in odd_flaws[0]


def test_a_regression_is_named(tmp_path):
    limits = tmp_path / "registers.json"
    arguments = ("--only", "bag_sum D=1024 bf16$", "--arch", "90", "--limits", limits)
    assert run(REPORT, *arguments, "--record").returncode == 0
    assert run(REPORT, *arguments).returncode == 0

    recorded = json.loads(limits.read_text())
    (archs,) = recorded.values()
    (limit,) = archs["sm_90"].values()
    limit["registers"] -= 9
    limits.write_text(json.dumps(recorded))
    report = run(REPORT, *arguments)
    assert report.returncode == 1
    had, has = limit["registers"], limit["registers"] + 9
    assert f"bag_sum D=1024 bf16 on sm_90: {has} registers, recorded {had}" in report.stdout


def test_launches_are_listed_and_chosen_by_name():
    listed = run(REPORT, "--list", "--only", "^bag_sum D=1024 bf16$")
    assert (listed.returncode, listed.stdout) == (0, "bag_sum D=1024 bf16\n")
    nothing = run(REPORT, "--only", "bag_som")
    assert nothing.returncode == 2
    assert "no launch has --only 'bag_som' in its name; --list prints" in nothing.stderr
    wrong = run(REPORT, "--only", "bag_sum(")
    assert wrong.returncode == 2
    assert "argument --only: 'bag_sum(' is no regular expression" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared", "warps"),
    [
        (1, 58, 0, 32),  # 32 blocks
        (4, 32, 0, 64),  # all
        (4, 64, 0, 32),
        (4, 72, 0, 28),  # 9 * 256 registers a warp: 7 warps a scheduler
        (8, 168, 0, 8),  # 3 warps a scheduler are 12: one block
        (8, 255, 227 * 1024, 8),
        (8, 255, 228 * 1024, 0),
        (4, 32, 56 * 1024, 16),
    ],
)
def test_warps_of_a_multiprocessor(num_warps, registers, shared, warps):
    assert warps_of_multiprocessor(90, num_warps, registers, shared) == warps


def test_widths_of_loads():
    names = "LDG.E.128 LDG.E.EF.128 LDGSTS.E.BYPASS.128 LDG.E.64.CONSTANT LDG.E LDG.E.U16 LDG.E.U8"
    assert [width(name) for name in names.split()] == [16, 16, 16, 8, 4, 2, 1]
