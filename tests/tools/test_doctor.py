"""tools/doctor.py: what it says about healthy, incomplete and broken environments."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("doctor", ROOT / "tools/doctor.py")
doctor = importlib.util.module_from_spec(_spec)
sys.modules["doctor"] = doctor  # dataclasses look their module up
_spec.loader.exec_module(doctor)

GPU = {"name": "NVIDIA Test", "gib": 80.0, "capability": "9.0", "error": ""}
CUDA_FACTS = {"torch_cuda": "13.0", "collectives": ["nccl", "gloo"], "cuda_says": "", "gpus": [GPU]}
NO_GPU_FACTS = {**CUDA_FACTS, "gpus": []}


def run_doctor(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, str(ROOT / "tools/doctor.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_reports_an_environment_that_can_train():
    done = run_doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("Ready to train.")
    on_gpu = "device             CUDA" in done.stdout
    assert f"collectives        {'nccl' if on_gpu else 'gloo'}" in done.stdout
    assert "MISSING" not in done.stdout


def test_runs_with_only_the_standard_library():
    done = run_doctor("-I", "-S")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert "torch              MISSING" in done.stdout
    assert "-m pip install 'psutil>=5.9,<8'" in done.stdout
    assert "transformer-engine     missing" in done.stdout
    assert "Not ready" in done.stdout


@pytest.mark.parametrize(
    ("line", "version", "accepted"),
    [
        ("torch==2.13.0", "2.13.0+cpu", True),
        ("torch==2.13.0", "2.13", True),
        ("torch==2.13.0", "2.13.1", False),
        ("torch>=2.6", "2.15.0", True),
        ("torch>=2.6", "2.5.1", False),
        ("megatron-core>=0.16.1,<0.17", "0.16.1", True),
        ("megatron-core>=0.16.1,<0.17", "0.17.0rc0", False),
        ("codespell[toml]==2.4.3", "2.4.3", True),
        ('triton>=3.2; platform_system == "Linux"', "3.10.0", True),
        ("anything", "0.0.1", True),
    ],
)
def test_version_ranges(line, version, accepted):
    assert doctor.Requirement.parse(line).accepts(version) is accepted


def test_refuses_requirements_it_would_misread():
    with pytest.raises(ValueError, match="not a requirement"):
        doctor.Requirement.parse("")
    with pytest.raises(ValueError, match="unknown version clause"):
        doctor.Requirement.parse("torch~=2.6").accepts("2.7")
    with pytest.raises(ValueError, match="unknown marker"):
        doctor.Requirement.parse("torch; sys_platform == 'linux'").applies_here()


def test_one_line_of_megatron_core_a_python():
    below = doctor.Requirement.parse('megatron-core==0.16.1; python_version < "3.12"')
    above = doctor.Requirement.parse("megatron-core==0.19.2; python_version >= '3.12'")
    is_new = sys.version_info >= (3, 12)
    assert (below.applies_here(), above.applies_here()) == (not is_new, is_new)
    assert doctor.tested_versions()["megatron-core"] == ("0.19.2" if is_new else "0.16.1")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no tomllib to compare with")
def test_reads_pyproject_as_a_toml_reader_does():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = doctor.accepted_requirements()
    assert listed == [doctor.Requirement.parse(line) for line in project["dependencies"]]


def test_requirements_and_pyproject_name_the_same_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = [doctor.Requirement.parse(line) for line in lines if line and line[0] != "#"]
    # Of megatron-core there is one for older Pythons and one for newer ones.
    by_name = {r.name: r for r in sorted(pinned, key=doctor.Requirement.applies_here)}
    accepted = doctor.accepted_requirements()
    assert set(by_name) - {r.name for r in accepted} == {
        *(
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "codespell",
            "bandit",
            "pip-audit",
            "zstandard",
            "pyarrow",
        )
    }
    assert {(r.name, r.marker) for r in accepted} <= {(r.name, r.marker) for r in pinned}
    for requirement in accepted:
        if not requirement.applies_here() and by_name[requirement.name].applies_here():
            continue
        exact = doctor.tested_versions().get(requirement.name)
        if exact is None:
            assert by_name[requirement.name] == requirement
        else:
            assert requirement.accepts(exact)
            assert by_name[requirement.name].applies_here() == requirement.applies_here()


def test_names_what_is_missing_and_what_has_the_wrong_version():
    accepted = [
        doctor.Requirement.parse(line)
        for line in ("torch>=2.6", "megatron-core>=0.16.1,<0.17", "psutil>=5.9,<8", "rich>=13")
    ]
    versions = {"torch": "2.11.0+cu130", "megatron-core": "0.17.0", "rich": "15.0.0"}
    tested = {"torch": "2.13.0", "megatron-core": "0.16.1"}
    lines, problems = doctor.check_packages(accepted, tested, versions.get)
    assert lines[0].split(maxsplit=1) == ["torch", "2.11.0+cu130  accepted; tested with 2.13.0"]
    assert "WRONG VERSION" in lines[1]
    assert lines[2].split() == ["psutil", "MISSING"]
    assert lines[3].split() == ["rich", "15.0.0"]
    megatron, psutil = problems
    assert megatron.fatal and megatron.fix.endswith("-m pip install 'megatron-core==0.16.1'")
    assert psutil.fatal and "hangs without it" in psutil.what
    assert psutil.fix.endswith("-m pip install 'psutil>=5.9,<8'")


def test_a_package_for_another_platform_is_not_missed():
    elsewhere = doctor.Requirement.parse('triton>=3.2; platform_system == "Plan9"')
    assert doctor.check_packages([elsewhere], {}, lambda name: None) == ([], [])


def test_triton_must_be_the_one_that_torch_names():
    requires = ["filelock", 'triton==3.7.1; platform_system == "Linux"']
    assert doctor.check_triton(requires, "3.7.1") == []
    assert doctor.check_triton(["filelock"], "3.6.0") == []
    (problem,) = doctor.check_triton(requires, "3.6.0")
    assert "requires 3.7.1" in problem.what
    assert problem.fix.endswith("'triton==3.7.1'")


@pytest.mark.parametrize(
    ("version", "count", "fatal"), [((3, 9), 1, True), ((3, 11), 0, None), ((3, 14), 1, False)]
)
def test_python_versions(version, count, fatal):
    problems = doctor.check_python(version)
    assert [problem.fatal for problem in problems] == [fatal] * count


def test_limits_of_the_machine():
    assert doctor.check_limits(1 << 30, 1024, {}) == []
    assert doctor.check_limits(None, -1, {}) == []  # no /dev/shm; unlimited files
    problems = doctor.check_limits(64 << 20, 256, {"TRITON_INTERPRET": "1"})
    text = [problem.what + problem.fix for problem in problems]
    assert "64 MiB" in text[0] and "--shm-size" in text[0]
    assert "256 files" in text[1] and "ulimit -n" in text[1]
    assert "unset TRITON_INTERPRET" in text[2]
    assert not any(problem.fatal for problem in problems)


def test_working_gpus_are_listed():
    lines, problems = doctor.check_gpus(CUDA_FACTS, ["NVIDIA Test, 580"], "")
    assert lines == ["GPU 0              NVIDIA Test, 80.0 GiB, sm 9.0"]
    assert problems == []


def test_no_gpu_at_all_is_no_problem():
    lines, problems = doctor.check_gpus(NO_GPU_FACTS, [], "")
    assert lines[0].split() == ["GPU", "none"]
    assert problems == []


def test_why_torch_sees_no_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cpu_build = {**NO_GPU_FACTS, "torch_cuda": None}
    (problem,) = doctor.check_gpus(cpu_build, ["NVIDIA Test"], "")[1]
    assert "CPU build" in problem.what and "'torch==" in problem.fix

    old_driver = {**NO_GPU_FACTS, "cuda_says": "The NVIDIA driver on your system is too old"}
    (problem,) = doctor.check_gpus(old_driver, ["NVIDIA Test"], "")[1]
    assert "too old" in problem.what and "CUDA 13.0" in problem.fix

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (problem,) = doctor.check_gpus(NO_GPU_FACTS, ["NVIDIA Test"], "")[1]
    assert problem.fix == "unset CUDA_VISIBLE_DEVICES"


def test_gpus_that_fail_stop_training():
    broken = {**CUDA_FACTS, "gpus": [GPU, {**GPU, "error": "no kernel image is available"}]}
    (problem,) = doctor.check_gpus(broken, [], "")[1]
    assert problem.fatal and "GPU 1 fails: no kernel image" in problem.what

    without_nccl = {**CUDA_FACTS, "collectives": ["gloo"]}
    (problem,) = doctor.check_gpus(without_nccl, [], "")[1]
    assert problem.fatal and "NCCL" in problem.what

    (problem,) = doctor.check_gpus(NO_GPU_FACTS, [], "Driver/library version mismatch")[1]
    assert "Driver/library version mismatch" in problem.what


@pytest.mark.parametrize(
    ("device", "te", "module", "layers", "adam"),
    [
        ("cpu", True, "megatron_memory.runtime.adam", "local", "this project's"),
        ("cuda", False, "apex.optimizers.fused_adam", "local", "Apex's"),
        ("cuda", True, "transformer_engine.pytorch", "Transformer Engine", "Transformer Engine's"),
    ],
)
def test_says_what_training_will_pick(monkeypatch, device, te, module, layers, adam):
    monkeypatch.setattr("megatron_memory.optional.is_installed", lambda name: te)
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    lines = doctor.what_will_be_used({"device": device, "distributed": backend, "adam": module})
    assert lines[0].split() == ["device", device.upper()]
    assert lines[1].split() == ["collectives", backend]
    assert layers in lines[2] and adam in lines[3]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ({"device": "cpu", "runs_triton": False}, "torch, on the CPU"),
        ({"device": "cuda", "runs_triton": True}, "Triton 9.9.9, for sm 9.0"),
        (
            {"device": "cuda", "runs_triton": False, "why_no_triton": "the GPU is too old"},
            "torch: the GPU is too old",
        ),
        ({"device": "cuda"}, "unknown: see the problems below"),
    ],
)
def test_says_what_computes_the_memory(monkeypatch, found, line):
    monkeypatch.setattr(doctor, "installed_version", {"triton": "9.9.9"}.get)
    monkeypatch.setattr("megatron_memory.optional.is_installed", lambda name: False)
    facts = {"distributed": "gloo", "adam": "apex.x", "gpus": [GPU, GPU], **found}
    operators = doctor.what_will_be_used(facts)[4]
    assert operators.split(maxsplit=2) == ["memory", "operators", line]


def test_the_probe_knows_what_computes_the_memory():
    facts = doctor.run_probe()
    assert facts["runs_triton"] == (facts["device"] == "cuda"), facts
    assert facts["why_no_triton"] == ""


@pytest.fixture
def checkout_with_probe(tmp_path, monkeypatch):
    """Lets the doctor run another probe: a function that takes its source."""

    def write(source: str) -> None:
        (tmp_path / "tools").mkdir()
        (tmp_path / "tools/doctor_probe.py").write_text(source)
        monkeypatch.setattr(doctor, "ROOT", tmp_path)

    return write


def test_a_crash_while_importing_is_reported(checkout_with_probe):
    checkout_with_probe("import os; print('{\"gpus\": []}', flush=True); os.abort()")
    facts = doctor.run_probe()
    assert facts["gpus"] == [] and facts["error"]
    (problem,) = doctor.check_probe(facts)
    assert problem.fatal and problem.what.startswith("megatron-core does not start")


def test_an_import_error_is_quoted(checkout_with_probe):
    checkout_with_probe("raise ImportError('libcudart.so.13: cannot open shared object file')")
    (problem,) = doctor.check_probe(doctor.run_probe())
    assert problem.what.startswith("torch does not start") and "libcudart" in problem.what


def test_a_hang_while_importing_is_reported(checkout_with_probe, monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_SECONDS", 0.5)
    checkout_with_probe("import time; time.sleep(60)")
    (problem,) = doctor.check_probe(doctor.run_probe())
    assert problem.fatal and "took over" in problem.what


def test_notices_a_missing_or_foreign_installation(monkeypatch, tmp_path):
    foreign = importlib.util.spec_from_file_location("memory_kernels", tmp_path / "__init__.py")
    specs = {"megatron_memory": None, "memory_kernels": foreign}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", specs.get)
    missing, elsewhere = doctor.check_checkout()
    assert missing.fatal and "pip install --no-deps" in missing.fix
    assert not elsewhere.fatal and str(tmp_path) in elsewhere.what


def test_notices_the_other_apex(monkeypatch):
    monkeypatch.setattr("megatron_memory.optional.is_installed", lambda name: False)
    monkeypatch.setattr(doctor, "installed_version", {"apex": "0.9.10.dev0"}.get)
    (problem,) = doctor.check_optional()[1]
    assert "not NVIDIA's" in problem.what and "uninstall apex" in problem.fix
