"""What is written, in the foreground and behind the training, and what loads of it."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_memory.config import Config, load_config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training import trainer
from megatron_memory.training.checkpoint import folders, rng_state, saver
from megatron_memory.training.checkpoint.common_state import read_values
from tests.distributed import run_ranks
from tests.training.tiny_runs import Run, change, run, runs, tiny_config


def _saving(dataset: str, folder: Path, train_iters: int = 6, **checkpoint) -> Config:
    settings = {"save": str(folder), "save_interval": 2} | checkpoint
    config = tiny_config(dataset, checkpoint=settings)
    return change(config, "training", train_iters=train_iters)


def _tensors(folders: list[str]) -> list[dict[str, torch.Tensor]]:
    loaded = [dist_checkpointing.load_plain_tensors(folder) for folder in folders]
    return [{k: v for k, v in d.items() if isinstance(v, torch.Tensor)} for d in loaded]


def test_async_save_holds_the_same_as_sync(dataset: str, tmp_path: Path):
    dropout = {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    configs = [
        change(_saving(dataset, tmp_path / name, async_save=name == "async"), "model", **dropout)
        for name in ("sync", "async")
    ]
    run_ranks(runs, 1, configs)
    for iteration in (2, 4, 6):
        names = [str(tmp_path / n / f"iter_{iteration:07d}") for n in ("sync", "async")]
        sync, behind = run_ranks(_tensors, 1, names)[0]
        assert len(sync) > 20 and sync.keys() == behind.keys()
        for key, tensor in sync.items():
            assert torch.equal(tensor, behind[key]), (iteration, key)
    assert folders.read_tracker(tmp_path / "async") == 6


def test_overlapped_gather_saves_the_updated_weights(dataset: str, tmp_path: Path):
    """They reach the other ranks during the next forward pass only, which is after the save."""
    names = ["plain", "overlapped"]
    for name in names:
        overlap = name == "overlapped"
        config = change(
            _saving(dataset, tmp_path / name, train_iters=3, save_interval=3),
            "parallel",
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        run_ranks(runs, 2, [config])
    plain, overlapped = run_ranks(_tensors, 1, [str(tmp_path / n / "iter_0000003") for n in names])[
        0
    ]
    weights = [key for key in plain if not key.startswith("optimizer.")]
    assert len(weights) > 5
    for key in weights:
        assert torch.equal(plain[key], overlapped[key]), key


def test_keep_last_and_the_saved_configuration(dataset: str, tmp_path: Path):
    config = _saving(dataset, tmp_path / "save", keep_last=2, async_save=True)
    run_ranks(runs, 2, [config])
    assert folders.saved_iterations(tmp_path / "save") == [4, 6]
    assert sorted(p.name for p in (tmp_path / "save").iterdir()) == [
        "config.yaml",
        "iter_0000004",
        "iter_0000006",
        "latest_checkpointed_iteration.txt",
    ]
    assert load_config(tmp_path / "save" / "config.yaml") == config
    assert load_config(tmp_path / "save" / "iter_0000006" / "config.yaml") == config


CRASHES = {
    "while files are written": (FileSystemWriterAsync, "retrieve_write_results"),
    "before the checkpoint has its name": (folders, "publish"),
    "before the tracker moves": (folders, "_put_tracker"),
    "while old ones are deleted": (folders.shutil, "rmtree"),
}


def _crash_at(config: Config, moment: str) -> None:
    owner, name = CRASHES[moment]
    original = getattr(owner, name)

    def crash(*args, **kwargs):
        if folders.read_tracker(Path(config.checkpoint.save)) is not None:
            os._exit(9)
        return original(*args, **kwargs)

    setattr(owner, name, crash)
    run(config)


@pytest.mark.parametrize("moment", CRASHES)
def test_crash_while_saving_leaves_a_checkpoint_to_go_on_from(
    moment: str, dataset: str, tmp_path: Path
):
    config = _saving(dataset, tmp_path / "save", keep_last=1)
    with pytest.raises(AssertionError, match="died without a word"):
        run_ranks(_crash_at, 1, config, moment)
    left = folders.read_tracker(tmp_path / "save")
    assert left == (4 if moment == "while old ones are deleted" else 2)
    # It has its name, so that it is complete.
    newest = 4 if moment == "before the tracker moves" else left
    resumed, whole = run_ranks(
        runs, 1, [change(config, "checkpoint", load=str(tmp_path / "save")), _unsaved(config)]
    )[0]
    assert resumed.losses == whole.losses[newest:]
    assert folders.saved_iterations(tmp_path / "save") == [6]
    assert not (tmp_path / "save" / "earlier-1").exists()


def _unsaved(config: Config) -> Config:
    return change(config, "checkpoint", save=None, save_interval=None, keep_last=None)


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Run]:
    """Eight iterations without dropout, with a checkpoint of the fourth."""
    folder = tmp_path_factory.mktemp("trained")
    config = _saving(dataset, folder, train_iters=8, save_interval=4)
    return config, folder, run_ranks(runs, 1, [config])[0][0]


def _resume(trained, **checkpoint) -> Config:
    config, folder, _ = trained
    load = str(folder / "iter_0000004")
    return change(
        config, "checkpoint", **({"load": load, "save": None, "save_interval": None} | checkpoint)
    )


def _one(config: Config) -> Run:
    return run_ranks(runs, 1, [config])[0][0]


def test_no_load_optim_keeps_weights_and_schedule(trained):
    whole = trained[2]
    resumed = _one(_resume(trained, no_load_optim=True))
    assert resumed.iterations == [5, 6, 7, 8]
    assert resumed.losses[0] == whole.losses[4] and resumed.losses[1] != whole.losses[5]
    assert resumed.learning_rates == whole.learning_rates[4:]


def test_finetune_starts_anew_from_the_weights(trained):
    whole = trained[2]
    resumed = _one(_resume(trained, finetune=True))
    assert resumed.iterations == list(range(1, 9))
    assert resumed.learning_rates == whole.learning_rates
    assert resumed.losses[0] < whole.losses[0]


def test_missing_parts_of_a_checkpoint(trained, tmp_path: Path):
    weights_only = change(
        _resume(trained, no_save_optim=True, no_save_rng=True, save=str(tmp_path / "save")),
        "training",
        train_iters=5,
    )
    _one(change(weights_only, "optimizer", lr_decay_iters=20))
    config = _resume(trained, load=str(tmp_path / "save"))
    with pytest.raises(AssertionError, match="holds no optimizer state.*--no-load-optim"):
        _one(config)
    assert _one(change(config, "checkpoint", no_load_optim=True)).iterations == [6, 7, 8]


def test_schedule_must_agree_or_be_chosen(trained):
    whole = trained[2]
    changed = change(_resume(trained), "optimizer", lr=2e-2)
    with pytest.raises(AssertionError, match=r"another schedule: --lr 0.01 there, 0.02 here"):
        _one(changed)
    with pytest.raises(AssertionError, match=r"--memory-value-lr 0.001 there, 0.1 here"):
        _one(change(_resume(trained), "memory", value_lr=0.1))
    kept = _one(change(changed, "optimizer", use_checkpoint_opt_param_scheduler=True))
    assert kept.losses == whole.losses[4:] and kept.learning_rates == whole.learning_rates[4:]
    taken = change(changed, "memory", value_lr=0.1)
    taken = _one(change(taken, "optimizer", override_opt_param_scheduler=True))
    for (rate, value_rate), (old, old_value) in zip(
        taken.learning_rates, whole.learning_rates[4:], strict=True
    ):
        assert rate == pytest.approx(2 * old) and value_rate == pytest.approx(100 * old_value)


def test_another_batch_size_reads_on_where_the_data_stands(trained):
    """With a learning rate of zero one loss over 16 samples is the mean of two over 8."""
    still = change(_resume(trained), "optimizer", lr=0.0, override_opt_param_scheduler=True)
    still = change(still, "memory", value_lr=0.0)
    small = _one(change(still, "training", train_iters=8))
    large = _one(change(still, "training", train_iters=6, global_batch_size=16))
    assert small.iterations == [5, 6, 7, 8] and large.iterations == [5, 6]
    means = [sum(small.losses[i : i + 2]) / 2 for i in (0, 2)]
    assert large.losses == pytest.approx(means, abs=1e-5)
    assert means[0] != pytest.approx(means[1], abs=1e-3)


def test_finished_training_is_not_saved_again(trained, tmp_path: Path):
    save = str(tmp_path / "save")
    config = _resume(trained, load=str(trained[1]), save=save, save_interval=1)
    assert _one(config).iterations == []
    assert folders.saved_iterations(tmp_path / "save") == []


def test_checkpoint_of_another_program_gives_its_weights_only(trained, tmp_path: Path):
    copy = tmp_path / "iter_0000004"
    shutil.copytree(trained[1] / "iter_0000004", copy)
    common, _ = read_values(copy)
    torch.save(
        {"iteration": 4, "args": {"lr": 1.0}, "optimizer": common["optimizer"]}, copy / "common.pt"
    )
    for name in ("config.yaml", "integrity.json"):
        (copy / name).unlink()
    config = _resume(trained, load=str(copy))
    with pytest.raises(AssertionError, match="written by another program.*--finetune"):
        _one(config)
    ours = _one(_resume(trained, finetune=True))
    assert _one(change(config, "checkpoint", finetune=True)).losses == ours.losses


def test_missing_checkpoint_starts_anew_or_fails(trained, tmp_path: Path):
    config = _resume(trained, load=str(tmp_path / "nothing"))
    assert _one(config).losses == trained[2].losses
    with pytest.raises(AssertionError, match="there is no checkpoint"):
        _one(change(config, "checkpoint", exit_on_missing_checkpoint=True))


def _two_ranks_see_the_error(config: Config) -> str:
    try:
        run(config)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_every_rank_meets_the_same_error(trained):
    config = change(_resume(trained), "memory", num_heads=4)
    first, second = run_ranks(_two_ranks_see_the_error, 2, config)
    assert "--memory-num-heads 2 there, 4 here" in first
    assert first == second


def test_failed_writing_stops_every_rank(dataset: str, tmp_path: Path):
    config = _saving(dataset, tmp_path / "save")
    first, second = run_ranks(_fail_to_write_on_second, 2, config)
    for message in (first, second):
        assert "could not be written" in message and "iteration 2" in message
    assert "nowhere" in first
    assert folders.read_tracker(tmp_path / "save") == 2


def _fail_to_write_on_second(config: Config) -> str:
    original = FileSystemWriterAsync.write_preloaded_data

    def write(*args, results_queue, count_queue, local_proc_idx, **kwargs):
        if folders.saved_iterations(Path(config.checkpoint.save)):
            kwargs["write_bucket"] = ("/nowhere/at/all", *kwargs["write_bucket"][1:])
        return original(
            *args,
            results_queue=results_queue,
            count_queue=count_queue,
            local_proc_idx=local_proc_idx,
            **kwargs,
        )

    if torch.distributed.get_rank() == 1:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    return _two_ranks_see_the_error(config)


class _Harm:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def _save_harm(config: Config, path: str) -> None:
    rng_state.capture = lambda device: {"torch": _Harm(path)}
    run(config)


def test_code_in_an_object_is_not_run(dataset: str, tmp_path: Path):
    config, harm = _saving(dataset, tmp_path / "save"), tmp_path / "harm"
    run_ranks(_save_harm, 1, config, str(harm))
    harm.unlink(missing_ok=True)
    with pytest.raises(AssertionError, match="cannot be read"):
        _one(
            change(config, "checkpoint", load=str(tmp_path / "save"), save=None, save_interval=None)
        )
    assert not harm.exists()


def test_checkpoint_of_the_same_iteration_is_not_written_twice(dataset: str, tmp_path: Path):
    config = change(_saving(dataset, tmp_path / "save"), "training", exit_interval=2)
    saved = run_ranks(_count_saves, 1, config)[0]
    assert saved == [2]


def _count_saves(config: Config) -> list[int]:
    saves = []
    original = trainer.CheckpointSaver.save

    def save(self, position, more):
        saves.append(position.iteration)
        return original(self, position, more)

    trainer.CheckpointSaver.save = save
    run(config)
    return saves


def test_ranks_with_nothing_in_a_place_are_like_those_without_it():
    """Else megatron-core warns of every save of a pipeline with a memory."""
    common = {"iteration": 2, "usage": {}, "optimizer": {0: {"groups": [{}]}, 1: {"state": {}}}}
    assert saver._without_empty(common) == {"iteration": 2, "optimizer": {0: {"groups": [{}]}}}
