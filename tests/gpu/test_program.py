"""The training program on a GPU as users start it: bf16, a restart, text from a checkpoint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import needs_gpu_run
from tests.training.tiny_runs import write_dataset

pytestmark = [pytest.mark.gpu, needs_gpu_run]

REPOSITORY = Path(__file__).parents[2]
MODEL = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 16 --vocab-size 64
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--memory-layers 1 --memory-num-half-keys 16 --memory-num-heads 2 --memory-top-k 4 --memory-qk-norm
--micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 --log-interval 1 --eval-iters 0
--split 1,0,0 --bf16 --device cuda
"""
VARIANTS = {
    "swiglu": [],
    "gelu": ["--no-swiglu"],
    "torch": ["--memory-kernels", "torch"],
    "fp8": ["--memory-fp8-values", "--memory-kernels", "triton"],
    "distopt": ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"],
}


def _run(module: str, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", f"megatron_memory.{module}", *flags],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def _losses(output: str) -> list[str]:
    return re.findall(r"iteration +\d+/4 \| loss ([\d.]+)", output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_is_exact_and_text_follows(variant: str, tmp_path: Path):
    flags = [*MODEL.split(), *VARIANTS[variant], "--data-path", write_dataset(tmp_path)]
    checkpoints = str(tmp_path / "checkpoints")
    output = _run("train", *flags)
    assert ("memory kernels: torch" if variant == "torch" else "memory kernels: Triton") in output
    whole = _losses(output)
    first = _run("train", *flags, "--save", checkpoints, "--exit-interval", "2", "--async-save")
    second = _run("train", *flags, "--load", checkpoints)
    assert len(whole) == 4
    assert _losses(first) + _losses(second) == whole
    flags = ["--load", checkpoints, "--num-tokens-to-generate", "4", "--greedy"]
    assert "tokens/s" in _run("generate", *flags, "--prompt", "1 2 3")
