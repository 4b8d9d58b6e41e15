"""Say what is installed, what is missing and how to install it, and what training will use.

    python tools/doctor.py

Needs the standard library only. Exit status: 0 when training can start, 1 when something that it
needs is missing or broken.
"""

from __future__ import annotations

import ast
import dataclasses
import glob
import importlib.metadata
import importlib.util
import json
import operator
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
MIN_SHARED_MEMORY_BYTES = 1 << 30
# Its size is looked at; nothing is written there.
SHARED_MEMORY = "/dev/shm"  # nosec B108
MIN_OPEN_FILES = 1024
PROBE_TIMEOUT_SECONDS = 300
REASONS = {
    "psutil": "megatron-core does not declare it, and a checkpoint save hangs without it",
    "tqdm": "megatron-core does not declare it, and its inference engine needs it",
}
_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One line of requirements: a name, and the versions that are accepted."""

    name: str
    specifier: str
    marker: str = ""

    @classmethod
    def parse(cls, line: str) -> Requirement:
        """Read `name[extra]>=1,<2; marker`. ValueError: the line is something else."""
        match = re.fullmatch(r"([\w.-]+)(?:\[[^]]*\])?\s*([^;]*?)\s*(?:;\s*(.*))?", line.strip())
        if match is None:
            raise ValueError(f"not a requirement: {line!r}")
        return cls(match[1], match[2], match[3] or "")

    def applies_here(self) -> bool:
        """Whether this machine needs it. ValueError: a marker of something else than the platform
        and Python's version."""
        if not self.marker:
            return True
        if match := re.fullmatch(r"platform_system == [\"'](\w+)[\"']", self.marker):
            return platform.system() == match[1]
        if match := re.fullmatch(r"python_version (<|>=) [\"']([\d.]+)[\"']", self.marker):
            return _COMPARISONS[match[1]](sys.version_info[:2], _release(match[2]))
        raise ValueError(f"{self.name}: unknown marker {self.marker!r}")

    def accepts(self, version: str) -> bool:
        """Whether the version is in range; a local part such as `+cpu` does not count."""
        for clause in filter(None, self.specifier.split(",")):
            match = re.fullmatch(r"\s*(==|!=|>=|<=|>|<)\s*([\d.]+)\s*", clause)
            if match is None:
                raise ValueError(f"{self.name}: unknown version clause {clause!r}")
            if not _COMPARISONS[match[1]](_release(version), _release(match[2])):
                return False
        return True

    def __str__(self) -> str:
        return f"{self.name}{self.specifier}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it; fatal when training cannot start with it."""

    what: str
    fix: str
    fatal: bool = False


def _release(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13), so that 2.13 and 2.13.0 compare as equal."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(number) for number in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def accepted_requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[Requirement]:
    """What the package needs, from `dependencies` in pyproject.toml.

    Python 3.10 has no TOML reader, but an array of TOML strings is a Python list as well.
    """
    match = re.search(
        r"^dependencies = (\[.*?^\])", pyproject.read_text(), re.MULTILINE | re.DOTALL
    )
    if match is None:
        raise ValueError(f"{pyproject}: found no list named dependencies")
    return [Requirement.parse(line) for line in ast.literal_eval(match[1])]


def tested_versions(requirements: Path = ROOT / "requirements.txt") -> dict[str, str]:
    """The versions that requirements.txt names exactly for this machine, by package."""
    lines = re.findall(r"^[\w-]+==.*", requirements.read_text(), re.MULTILINE)
    pins = map(Requirement.parse, lines)
    return {pin.name: pin.specifier.removeprefix("==") for pin in pins if pin.applies_here()}


def installed_version(distribution: str) -> str | None:
    """The version that is installed, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip_install(*what: str) -> str:
    return " ".join([sys.executable, "-m pip install", *(f"'{item}'" for item in what)])


def check_python(version: tuple[int, ...] = sys.version_info[:2]) -> list[Problem]:
    """Whether this Python is one for which everything required has wheels."""
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return []
    return [
        Problem(
            f"Python {version[0]}.{version[1]}: 3.10 to 3.13 are supported",
            "name a fitting one: make setup BASE_PYTHONS=python3.11",
            fatal=version < OLDEST_PYTHON,
        )
    ]


def check_packages(
    requirements: list[Requirement],
    tested: dict[str, str],
    version_of: Callable[[str], str | None] = installed_version,
) -> tuple[list[str], list[Problem]]:
    """One line for each required package, and the problems among them."""
    lines, problems = [], []
    for requirement in requirements:
        if not requirement.applies_here():
            continue
        name, version = requirement.name, version_of(requirement.name)
        if version is None:
            lines.append(f"{name:<18} MISSING")
            reason = f" ({REASONS[name]})" if name in REASONS else ""
            problems.append(
                Problem(f"{name} is missing{reason}", _pip_install(str(requirement)), fatal=True)
            )
        elif not requirement.accepts(version):
            lines.append(f"{name:<18} {version}  WRONG VERSION, {requirement.specifier} wanted")
            wanted = f"{name}=={tested[name]}" if name in tested else str(requirement)
            problems.append(
                Problem(
                    f"{name} {version}: {requirement.specifier} wanted",
                    _pip_install(wanted),
                    fatal=True,
                )
            )
        elif name in tested and _release(version) != _release(tested[name]):
            lines.append(f"{name:<18} {version}  accepted; tested with {tested[name]}")
        else:
            lines.append(f"{name:<18} {version}")
    return lines, problems


def check_triton(torch_requires: list[str] | None, triton_version: str | None) -> list[Problem]:
    """torch's CUDA builds name the one Triton that they were made for."""
    for line in torch_requires or []:
        match = re.match(r"triton\s*==\s*([\d.]+)", line)
        if match and triton_version and _release(match[1]) != _release(triton_version):
            return [
                Problem(
                    f"triton {triton_version} does not belong to the installed torch, "
                    f"which requires {match[1]}",
                    _pip_install(f"triton=={match[1]}"),
                )
            ]
    return []


def check_checkout() -> list[Problem]:
    """Whether Python finds this checkout's two packages by itself, and no others of that name."""
    problems = []
    fix = f"cd {ROOT} && {sys.executable} -m pip install --no-deps --no-build-isolation -e ."
    for name in ("megatron_memory", "memory_kernels"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            problems.append(Problem(f"{name} is not installed", fix, fatal=True))
        elif ROOT not in Path(spec.origin or "").resolve().parents:
            problems.append(Problem(f"{name} is taken from {spec.origin}, not from here", fix))
    return problems


def check_optional() -> tuple[list[str], list[Problem]]:
    """One or two lines for each optional package, and the problems among them."""
    from megatron_memory.optional import OPTIONAL_PACKAGES, is_installed

    lines, problems = [], []
    for name, package in OPTIONAL_PACKAGES.items():
        version = installed_version(package.distribution)
        if is_installed(name):
            lines.append(f"{package.distribution:<22} {version or 'installed'}")
            continue
        lines.append(f"{package.distribution:<22} missing: {package.purpose}")
        lines.append(f"{'':<22} {package.install}")
        if name == "apex" and version is not None:
            problems.append(
                Problem(
                    f"apex {version} is the package index's apex, not NVIDIA's",
                    f"{sys.executable} -m pip uninstall apex, then: {package.install}",
                )
            )
    return lines, problems


def check_machine() -> tuple[list[str], list[Problem]]:
    """Cores, memory, shared memory and file handles."""
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = [
        f"{'processor':<18} {os.cpu_count()} cores, {memory / 2**30:.0f} GiB of memory",
        f"{'open files':<18} {'unlimited' if open_files < 0 else open_files}",
    ]
    shared_memory = None
    if os.path.isdir(SHARED_MEMORY):
        filesystem = os.statvfs(SHARED_MEMORY)
        shared_memory = filesystem.f_frsize * filesystem.f_blocks
        lines.append(f"{SHARED_MEMORY:<18} {shared_memory / 2**30:.1f} GiB")
    return lines, check_limits(shared_memory, open_files, os.environ)


def check_limits(shared_memory: int | None, open_files: int, environment: Any) -> list[Problem]:
    """Problems with the size of /dev/shm (bytes), file handles and environment variables."""
    problems = []
    if shared_memory is not None and shared_memory < MIN_SHARED_MEMORY_BYTES:
        problems.append(
            Problem(
                f"{SHARED_MEMORY} has {shared_memory / 2**20:.0f} MiB: ranks and data loaders "
                "exchange data through it",
                "start the container with --shm-size=8g or --ipc=host, or: "
                "mount -o remount,size=8g /dev/shm",
            )
        )
    if 0 <= open_files < MIN_OPEN_FILES:
        problems.append(Problem(f"only {open_files} files may be open at once", "ulimit -n 65536"))
    if environment.get("TRITON_INTERPRET") == "1":
        problems.append(
            Problem("TRITON_INTERPRET=1: Triton kernels are interpreted", "unset TRITON_INTERPRET")
        )
    return problems


def run_probe() -> dict[str, Any]:
    """What doctor_probe.py finds; `error` where it breaks off."""
    command = [sys.executable, str(ROOT / "tools/doctor_probe.py")]
    facts: dict[str, Any] = {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"importing torch and megatron-core took over {PROBE_TIMEOUT_SECONDS} s"}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    if done.returncode:
        errors = done.stderr.strip().splitlines()
        facts["error"] = errors[-1] if errors else f"exit status {done.returncode}"
    return facts


def gpus_of_driver() -> tuple[list[str], str]:
    """GPUs that the driver knows of, without torch, and what the driver complains about."""
    nodes = glob.glob("/dev/nvidia[0-9]*")
    if shutil.which("nvidia-smi") is None:
        return nodes, ""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return nodes, "nvidia-smi does not answer"
    if done.returncode:
        return nodes, (done.stdout + done.stderr).strip().replace("\n", " ")
    return done.stdout.strip().splitlines(), ""


def check_gpus(
    facts: dict[str, Any], driver_gpus: list[str], complaint: str
) -> tuple[list[str], list[Problem]]:
    """One line for each GPU, and why torch sees none where there are some."""
    lines, problems = [], []
    for index, gpu in enumerate(facts.get("gpus", [])):
        lines.append(
            f"{f'GPU {index}':<18} {gpu['name']}, {gpu['gib']} GiB, sm {gpu['capability']}"
        )
        if gpu["error"]:
            fix = "check the driver with nvidia-smi, and that torch is built for this GPU"
            problems.append(Problem(f"GPU {index} fails: {gpu['error']}", fix, fatal=True))
    if lines and "nccl" not in facts["collectives"]:
        fix = _pip_install("--force-reinstall", "torch")
        problems.append(Problem("torch has no NCCL, which GPUs need", fix, fatal=True))
    if complaint:
        fix = "load the driver anew or restart the machine"
        problems.append(Problem(f"the NVIDIA driver complains: {complaint}", fix))
    if lines:
        return lines, problems
    lines.append(f"{'GPU':<18} {'none that torch sees' if driver_gpus else 'none'}")
    if driver_gpus and "gpus" in facts:
        problems.append(_unseen_gpus(facts, driver_gpus, os.environ.get("CUDA_VISIBLE_DEVICES")))
    return lines, problems


def _unseen_gpus(facts: dict[str, Any], driver_gpus: list[str], visible: str | None) -> Problem:
    what = f"torch sees no GPU, the driver has {len(driver_gpus)} ({driver_gpus[0]}): "
    if facts["torch_cuda"] is None:
        pins = [f"{name}=={tested_versions()[name]}" for name in ("torch", "triton")]
        fix = f"install a CUDA build: {_pip_install('--force-reinstall', *pins)}"
        return Problem(what + "torch is a CPU build", fix)
    if visible is not None and visible.strip() in ("", "-1"):
        return Problem(what + "CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")
    fix = f"install a driver for CUDA {facts['torch_cuda']} or newer"
    return Problem(what + (facts["cuda_says"] or "no reason given"), fix)


def what_will_be_used(facts: dict[str, Any]) -> list[str]:
    """Device, collectives, layers, optimizer and memory operators that training picks by itself."""
    from megatron_memory.optional import is_installed

    if "device" not in facts:
        return ["unknown: see the problems below"]
    cuda = facts["device"] == "cuda"
    layers = "Transformer Engine" if cuda and is_installed("te") else "megatron-core's own (local)"
    kinds = {"transformer_engine": "Transformer Engine's", "apex": "Apex's"}
    adam = kinds.get(facts["adam"].partition(".")[0], "this project's, on torch's fused kernels")
    return [
        f"{'device':<18} {'CUDA' if cuda else 'CPU'}",
        f"{'collectives':<18} {facts['distributed']}",
        f"{'layers':<18} {layers}",
        f"{'Adam':<18} {adam}",
        f"{'memory operators':<18} {_memory_operators(facts)}",
    ]


def _memory_operators(facts: dict[str, Any]) -> str:
    if "runs_triton" not in facts:
        return "unknown: see the problems below"
    if facts["runs_triton"]:
        capabilities = " and ".join(sorted({f"sm {gpu['capability']}" for gpu in facts["gpus"]}))
        return f"Triton {installed_version('triton')}, for {capabilities}"
    if facts["device"] == "cpu":
        return "torch, on the CPU"
    return f"torch: {facts['why_no_triton']}"


def check_probe(facts: dict[str, Any]) -> list[Problem]:
    """What went wrong when training's own imports were tried."""
    problems = []
    if "error" in facts:
        stages = {"gpus": "torch", "device": "megatron-core", "memory_kernels": "memory_kernels"}
        failed = next((name for fact, name in stages.items() if fact not in facts), "python")
        fix = f"install it again: {_pip_install('--force-reinstall', '--no-deps', failed)}"
        if failed == "memory_kernels":
            fix = f"restore {ROOT / 'kernels/memory_kernels'}"
        problems.append(Problem(f"{failed} does not start: {facts['error']}", fix, fatal=True))
    if facts.get("device") == "cpu" and "gloo" not in facts["collectives"]:
        fix = _pip_install("--force-reinstall", "torch")
        problems.append(Problem("torch has no gloo, which the CPU needs", fix, fatal=True))
    return problems


def _print_section(title: str, lines: list[str]) -> None:
    print(f"\n{title}")
    for line in lines:
        print(f"  {line}")


def _environment_hint() -> str:
    own = ROOT / ".venv/bin/python"
    if own.exists() and Path(sys.prefix) != ROOT / ".venv":
        return f"This is not the checkout's environment. Try: {own} tools/doctor.py"
    return "`make setup` installs everything required into .venv."


def report() -> int:
    """Examine everything, print it, and return the exit status."""
    problems = check_python()
    print(f"Python {platform.python_version()} at {sys.executable}")
    packages, found = check_packages(accepted_requirements(), tested_versions())
    problems += found
    _print_section("Required packages", packages)
    problems += check_checkout()
    sys.path.insert(0, str(ROOT))
    optional, found = check_optional()
    problems += found
    _print_section("Optional packages", optional)

    torch_version = installed_version("torch")
    facts: dict[str, Any] = {}
    if torch_version is not None:
        problems += check_triton(importlib.metadata.requires("torch"), installed_version("triton"))
        facts = run_probe()
        problems += check_probe(facts)
    machine, found = check_machine()
    problems += found
    gpus, found = check_gpus(facts, *gpus_of_driver())
    problems += found
    _print_section("Machine", machine + gpus)
    _print_section("What will be used", what_will_be_used(facts))

    described = [f"{'ERROR' if p.fatal else 'warning'}: {p.what}\n    -> {p.fix}" for p in problems]
    _print_section("Problems", described or ["none"])
    if any(problem.fatal for problem in problems):
        print(f"\nNot ready: something required is missing or broken. {_environment_hint()}")
        return 1
    print("\nReady to train.")
    return 0


def main() -> int:
    if sys.version_info < OLDEST_PYTHON:
        problem = check_python()[0]
        print(f"ERROR: {problem.what}\n    -> {problem.fix}")
        return 1
    return report()


if __name__ == "__main__":
    sys.exit(main())
