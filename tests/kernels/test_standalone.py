"""The kernels installed alone: no Megatron in sight, and the README's examples run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"

PROGRAM = """
import re, sys
from pathlib import Path
import memory_kernels
assert memory_kernels.__file__.startswith(sys.argv[1]), memory_kernels.__file__
readme = Path(sys.argv[2]).read_text()
for example in re.findall(r"```python\\n(.*?)```", readme, re.DOTALL):
    exec(example, {})
assert not [name for name in sys.modules if name.startswith("megatron")]
"""


@pytest.mark.slow
def test_installs_and_runs_without_megatron(tmp_path: Path):
    # Building writes beside the sources, which are therefore copied.
    source = shutil.copytree(
        KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__", "benchmarks")
    )
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([*pip, *alone, str(source)], check=True, cwd=tmp_path)
    metadata = next(site.glob("memory_kernels-*.dist-info"))
    assert (metadata / "licenses" / "LICENSE").is_file()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("TRITON_INTERPRET", None)
    readme = KERNELS / "memory_kernels" / "README.md"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(site), str(readme)],
        check=True,
        cwd=tmp_path,
        env=environment,
    )
