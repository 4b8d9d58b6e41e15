"""A run goes on with a folder's checkpoints, or begins where there are none: nothing is mixed."""

from pathlib import Path

import pytest

from megatron_memory.config import CheckpointConfig, Config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.lease import LEASE_FILE
from megatron_memory.training.checkpoint.save_folder import check_continues, make_way
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, tiny_config


def _checkpoints(root: Path, *iterations: int) -> Path:
    for iteration in iterations:
        folder = folders.begin(root, iteration)
        (folder / "common.pt").write_text(f"{root.name} {iteration}")
        folders.publish(root, iteration)
    (root / folders.CONFIG_FILE).write_text(root.name)
    return root


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    return _checkpoints(tmp_path / "theirs", 10, 20, 30)


def _settle(
    save: Path, load: Path | None = None, loaded: Path | None = None, **flags
) -> str | None:
    checkpoint = CheckpointConfig(save=str(save), load=load and str(load), **flags)
    check_continues(checkpoint, loaded)
    return make_way(checkpoint, loaded)


def test_what_is_in_the_way_is_refused_with_every_way_out(theirs: Path, tmp_path: Path):
    other = _checkpoints(tmp_path / "other", 10)
    cases = [
        (None, None, {}),
        (other, other / "iter_0000010", {}),
        (tmp_path / "nothing", None, {}),
        (other, other / "iter_0000010", {"finetune": True}),
    ]
    for load, loaded, flags in cases:
        with pytest.raises(CheckpointError) as refused:
            _settle(theirs, load, loaded, **flags)
        message = str(refused.value)
        assert f"--save {theirs} has checkpoints up to iteration 30" in message
        assert f"--load {theirs}" in message and "--start-anew" in message
        assert ("without --finetune" in message) == bool(flags)
    with pytest.raises(CheckpointError, match="--finetune --load .* begin at iteration 0"):
        _settle(theirs, theirs, theirs / "iter_0000030", finetune=True)
    with pytest.raises(CheckpointError, match="--start-anew would move away what --load"):
        _settle(theirs, theirs, theirs / "iter_0000030", start_anew=True)
    assert folders.saved_iterations(theirs) == [10, 20, 30]


def test_going_on_and_empty_folders_need_no_flag(theirs: Path, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(theirs)
    assert _settle(theirs, theirs, theirs / "iter_0000030") is None
    assert _settle(link, theirs, theirs / "iter_0000030") is None
    assert _settle(tmp_path / "new", theirs, theirs / "iter_0000030") is None
    assert _settle(tmp_path / "new", theirs, theirs / "iter_0000030", finetune=True) is None
    assert _settle(tmp_path / "new", start_anew=True) is None


def test_start_anew_moves_all_and_going_back_moves_what_came_after(theirs: Path):
    line = _settle(theirs, theirs, theirs / "iter_0000010")
    first = theirs / "earlier-1"
    assert line == (
        "this run goes on from iteration 10: checkpoints of iteration 20 to 30, which are newer, "
        f"are moved to {first}. To go on from those instead: --load {first} --save {first}"
    )
    assert (folders.saved_iterations(theirs), folders.read_tracker(theirs)) == ([10], 10)
    assert (folders.saved_iterations(first), folders.read_tracker(first)) == ([20, 30], 30)
    assert (first / "iter_0000030" / "common.pt").read_text() == "theirs 30"
    assert _settle(theirs, start_anew=True) is not None
    second = theirs / "earlier-2"
    assert (folders.saved_iterations(theirs), folders.read_tracker(theirs)) == ([], None)
    assert (folders.saved_iterations(second), folders.read_tracker(second)) == ([10], 10)
    assert (second / folders.CONFIG_FILE).read_text() == "theirs"


def test_leftovers_of_every_run_go_and_nothing_else(theirs: Path):
    for name in ("iter_0000040.incomplete", "iter_0000040.incomplete.a1b2", "mine.incomplete"):
        (theirs / name).mkdir()
    (theirs / f".{folders.TRACKER}.77.tmp").touch()
    (theirs / f".{folders.CONFIG_FILE}.77.tmp").touch()
    assert folders.finish_publishing(theirs) is None
    assert folders.remove_leftovers(theirs) == [
        "iter_0000040.incomplete",
        "iter_0000040.incomplete.a1b2",
    ]
    left = {path.name for path in theirs.iterdir()}
    assert left == {
        "iter_0000010",
        "iter_0000020",
        "iter_0000030",
        "mine.incomplete",
        folders.TRACKER,
        folders.CONFIG_FILE,
    }


def _program(config: Config) -> list[object]:
    """In one process group: a run, refusals, a run that goes on, one that starts anew."""
    save = Path(config.checkpoint.save)
    begun: list[set[str]] = []

    def look(iteration, result):
        begun.append({path.name for path in save.iterdir()})

    outcomes: list[object] = [run(config, look).iterations, LEASE_FILE in begun[0]]
    for changes in ({}, {"load": str(save)}):
        try:
            outcomes.append(run(change(config, "checkpoint", **changes)).iterations)
        except CheckpointError as error:
            outcomes.append(str(error))
    anew = change(config, "checkpoint", start_anew=True)
    return [*outcomes, run(anew).iterations]


def test_program_refuses_goes_on_and_starts_anew(dataset: str, tmp_path: Path):
    save = tmp_path / "save"
    config = tiny_config(dataset, checkpoint={"save": str(save), "save_interval": 2})
    config = change(config, "training", exit_interval=2, train_iters=20)
    first, second = run_ranks(_program, 2, config)
    assert first == second
    begun, had_lease, refused, went_on, anew = first
    assert begun == [1, 2] and had_lease
    assert "has checkpoints up to iteration 2" in refused
    assert went_on == [3, 4] and anew == [1, 2]
    assert folders.saved_iterations(save) == [2] and folders.read_tracker(save) == 2
    assert folders.saved_iterations(save / "earlier-1") == [2, 4]
    assert not (save / LEASE_FILE).exists()
