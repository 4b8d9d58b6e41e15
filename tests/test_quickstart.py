"""The quickstart as a user starts it, with a training of a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.distributed
def test_trains_resumes_and_answers(tmp_path: Path):
    output = tmp_path / "quickstart"
    options = ["--device", "cpu", "--train-iters", "4", "--num-questions", "3"]
    program = REPOSITORY / "examples" / "quickstart" / "run.py"
    result = subprocess.run(
        [sys.executable, str(program), "--output", str(output), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    run = output / "run-1"
    assert f"loaded {run}/checkpoints/iter_0000002, iteration 2" in result.stdout
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "4"
    assert "of 3 answers are right" in result.stdout
    assert "Validation loss on held-out WordNet text: 8." in result.stdout
    assert list((run / "tensorboard").iterdir())
