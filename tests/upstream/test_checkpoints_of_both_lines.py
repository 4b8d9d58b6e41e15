"""What either line of megatron-core has saved, the installed one goes on from."""

import zipfile
from pathlib import Path

import pytest

from megatron_memory.upstream import LINES
from tests.distributed import run_ranks
from tests.training.tiny_runs import Run, run, runs
from tests.upstream.saved_run import CHECKPOINTS, LAST, SAVED, config_of


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Of the installed line, from the beginning."""
    (whole,) = run_ranks(run, 1, config_of(tmp_path_factory.mktemp("data")))
    return whole


@pytest.mark.parametrize("line", LINES)
def test_it_goes_on_as_if_it_had_not_stopped(line: str, undisturbed: Run, tmp_path: Path):
    with zipfile.ZipFile(CHECKPOINTS / f"{line}.zip") as archive:
        archive.extractall(tmp_path)
    config = config_of(tmp_path, load=str(tmp_path / "saved"))
    ((resumed,),) = run_ranks(runs, 1, [config])
    assert resumed.iterations == list(range(SAVED + 1, LAST + 1))
    # Both lines compute alike; the processor that wrote the checkpoint may have been another.
    assert resumed.losses == pytest.approx(undisturbed.losses[SAVED:], abs=2e-6)
    for ours, whole in zip(resumed.norms, undisturbed.norms[SAVED:], strict=True):
        assert ours == pytest.approx(whole, rel=1e-4)
    assert resumed.learning_rates == undisturbed.learning_rates[SAVED:]
    assert resumed.weights.keys() == undisturbed.weights.keys()
