"""Losses, gradients, weights and states that are not finite: named, omitted, gone back from."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.exceptions import TrainingError
from megatron_memory.optimizer.states import states_by_parameter
from megatron_memory.training import finite, step, trainer
from megatron_memory.training.bad_steps import LossSpikes, is_spike_state
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.setup import TrainingSetup
from megatron_memory.training.step import StepResult
from tests.distributed import run_ranks
from tests.training.tiny_runs import Run, change, run, tiny_config

LAYER = "linear_fc2.weight"


@torch.no_grad()
def _spoil(kind: str, setup: TrainingSetup) -> None:
    """Make numbers of this rank none, where the step has its gradients."""
    named = dict(finite.named_parameters(setup))
    names = {parameter: name for name, parameter in named.items()}
    # A distributed optimizer has parts of some parameters: of one that this rank updates.
    own = list(states_by_parameter(setup.optimizer, list(named.values())))
    parameter, states = next((found for found in own if names[found[0]].endswith(LAYER)), own[0])
    if kind == "gradient":
        parameter.main_grad.fill_(float("inf"))
    elif kind == "weight":
        states.get("fp32_param", parameter.data).fill_(float("nan"))
    else:
        states["exp_avg_sq"].view(-1)[0] = float("nan")


def _spoiled_run(
    config: Config, kind: str, at: int, rank: int, times: int = 1
) -> tuple[Run | None, str, list[str]]:
    """A run with one number that is none, at a step on one rank; its end, and what was said."""
    said: list[str] = []
    say, sum_reports, train_step = trainer.Console.say, step._sum_reports, trainer.train_step
    number, setups = [0], []
    spoils = range(at, at + times)

    def counting(setup, *args):
        number[0] += 1
        setups[:] = [setup]
        return train_step(setup, *args)

    def spoiling(reports, device):
        if torch.distributed.get_rank() == rank and number[0] in spoils and reports:
            if kind == "loss":
                reports[0][0] = float("nan")
            elif setups and setups[0].model[0].training:
                _spoil(kind, setups[0])
        return sum_reports(reports, device)

    trainer.train_step, step._sum_reports = counting, spoiling
    trainer.Console.say = lambda self, line: said.append(line)
    try:
        return run(config), "", said
    except TrainingError as error:
        return None, str(error), said
    finally:
        trainer.train_step, step._sum_reports, trainer.Console.say = train_step, sum_reports, say


def _stops(config: Config, save: str) -> dict[str, str]:
    """What each kind of damage on rank 1 ends a run with; and what is saved then."""
    told = {}
    for kind in ("loss", "gradient", "weight", "state"):
        root = f"{save}/{kind}"
        saving = change(config, "checkpoint", save=root, save_interval=2, keep_last=1)
        _, told[kind], _ = _spoiled_run(saving, kind, at=3, rank=1)
        torch.distributed.barrier()
        told[f"{kind} saved"] = str(folders.saved_iterations(Path(root)))
    return told


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp2", "dp2 distributed", "dp2 bf16"])
def test_what_is_not_finite_is_named_and_never_saved(layout: str, dataset: str, tmp_path: Path):
    config = tiny_config(dataset)
    if layout == "tp2":
        config = change(config, "parallel", tensor_model_parallel_size=2, sequence_parallel=True)
    if layout == "dp2 distributed":
        config = change(config, "parallel", use_distributed_optimizer=True)
    if layout == "dp2 bf16":
        config = change(config, "precision", bf16=True)
    first, second = run_ranks(_stops, 2, config, str(tmp_path))
    assert first == second
    for kind in ("loss", "gradient", "weight", "state"):
        # Of the loss and the gradient the update is omitted; a weight is found when its loss is.
        assert first[f"{kind} saved"] == "[2]", (kind, first)
        assert "rank 1: " in first[kind], (kind, first[kind])
    assert first["loss"].startswith("iteration 3: the loss is nan")
    assert "rank 1: the loss of its samples" in first["loss"] and "--lr" in first["loss"]
    assert first["gradient"].startswith("iteration 3: the loss is 4.")
    assert "weight (gradient): " in first["gradient"]
    assert "iteration 4" in first["weight"] and ".weight: " in first["weight"]
    assert "iteration 4" in first["state"] and "exp_avg_sq" in first["state"]


def _compare(config: Config, save: str) -> dict[str, object]:
    """Runs that skip and rewind, and what they must equal."""
    found: dict[str, object] = {}
    seven = change(config, "training", train_iters=7)
    skipping = change(seven, "training", on_bad_step="skip")
    found["skipped"] = _spoiled_run(skipping, "gradient", at=3, rank=1)
    found["without batch 3"] = _without(seven, [3])
    skipping = change(skipping, "training", max_bad_steps=2)
    found["too many"] = _spoiled_run(skipping, "loss", at=3, rank=0, times=3)
    found["damaged"] = _spoiled_run(skipping, "weight", at=3, rank=1)
    rewinding = change(
        change(seven, "training", on_bad_step="rewind"),
        "checkpoint",
        save=f"{save}/rewound",
        save_interval=2,
        async_save=True,
    )
    found["rewound"] = _spoiled_run(rewinding, "loss", at=5, rank=1)
    found["without 5"] = _without(seven, [5])
    # Back to iteration 4 from step 6: the updates of 5 and 6 are gone.
    found["rewound two"] = _spoiled_run(
        change(rewinding, "checkpoint", save=f"{save}/two"), "gradient", at=6, rank=0
    )
    found["without 5 and 6"] = _without(seven, [5, 6])
    found["nothing saved"] = _spoiled_run(
        change(rewinding, "checkpoint", save=f"{save}/none", save_interval=6), "loss", 2, 1
    )
    damaged = change(rewinding, "checkpoint", save=f"{save}/damaged", save_interval=3)
    found["damaged state"] = _spoiled_run(damaged, "state", at=6, rank=1)
    found["without 4 to 6"] = _without(seven, [4, 5, 6])
    found["without 5 to 7"] = _without(seven, [5, 6, 7])
    last = change(damaged, "checkpoint", save=f"{save}/last", save_interval=4)
    found["damaged at the end"] = _spoiled_run(last, "state", at=7, rank=1)
    torch.distributed.barrier()
    found["saved at the end"] = folders.saved_iterations(Path(f"{save}/last"))
    plain = dict.fromkeys(OVERLAPPED, False)
    rewinding = change(change(rewinding, "parallel", **plain), "checkpoint", save=f"{save}/plain")
    found["rewound, plain optimizer"] = _spoiled_run(rewinding, "loss", at=5, rank=1)
    found["without 5, plain optimizer"] = _without(change(seven, "parallel", **plain), [5])
    return found


def _without(config: Config, steps: list[int]) -> Run:
    """The run whose data lack the batches of some steps."""
    batches = trainer.Trainer._batches

    def some(self, dataset, consumed_samples):
        yielded = batches(self, dataset, consumed_samples)
        for number in range(10_000):
            batch = next(yielded)
            if number // self._num_microbatches + 1 not in steps:
                yield batch

    trainer.Trainer._batches = some
    try:
        return run(change(config, "training", train_iters=7 - len(steps)))
    finally:
        trainer.Trainer._batches = batches


def _equal(one: Run, another: Run) -> bool:
    return one.weights.keys() == another.weights.keys() and all(
        torch.equal(piece, other)
        for name in one.weights
        for piece, other in zip(_flat(one.weights[name]), _flat(another.weights[name]), strict=True)
    )


def _flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [t for item in items if not isinstance(item, int | str) for t in _flat(item)]


OVERLAPPED = dict(
    use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
)


@pytest.mark.distributed
def test_skipping_and_going_back_equal_a_run_without_those_data(dataset: str, tmp_path: Path):
    config = change(tiny_config(dataset, logging={"log_interval": 1}), "parallel", **OVERLAPPED)
    for found in run_ranks(_compare, 2, config, str(tmp_path)):
        for name, reference in (
            ("skipped", "without batch 3"),
            ("rewound", "without 5"),
            ("rewound two", "without 5 and 6"),
            ("damaged state", "without 4 to 6"),
            ("damaged at the end", "without 5 to 7"),
            ("rewound, plain optimizer", "without 5, plain optimizer"),
        ):
            seen, problem, _ = found[name]
            assert problem == "" and seen.iterations == [1, 2, 3, 4, 5, 6, 7], (name, problem)
            assert _equal(seen, found[reference]), name
            if name != "damaged at the end":
                assert seen.losses[-1] == found[reference].losses[-1]
        # The last checkpoint is written although the run went back for it.
        assert found["saved at the end"] == [4, 7]
        assert not _equal(found["skipped"][0], found["rewound"][0])
        assert "3 in a row, and --max-bad-steps is 2" in found["too many"][1]
        assert "Omitting steps does not help" in found["damaged"][1]
        assert "has not saved a checkpoint yet" in found["nothing saved"][1]
    said = "\n".join(found["skipped"][2])
    assert "the step is omitted" in said and "| 1 skipped |" in said
    assert "loss nan" in next(line for line in found["skipped"][2] if "| 1 skipped |" in line)


def _results(losses: list[float]) -> list[StepResult]:
    return [
        StepResult(
            loss=loss,
            num_tokens=8.0,
            grad_norm=1.0,
            value_grad_norm=None,
            learning_rate=0.1,
            value_learning_rate=None,
            skipped=loss != loss,
        )
        for loss in losses
    ]


def test_a_spike_is_said_once_and_counted_while_it_lasts():
    said: list[str] = []
    spikes = LossSpikes(2.0, said.append)
    losses = [4.0, 8.0] * 4 + [3.0, 3.0] + [3.1, float("nan"), 12.5, 90.0, 12.0, 13.0, 12.4]
    seen = []
    for iteration, result in enumerate(_results(losses), 1):
        is_spike = spikes.look(iteration, result)
        seen.append((is_spike, spikes.spike and spikes.spike.first_iteration))
    # The median is 4 from the tenth loss on: neither the spike's losses nor NaN are part of it.
    assert seen[:12] == [(False, None)] * 12
    assert seen[12:] == [(True, 13), (True, 13), (True, 13), (True, 13), (True, 13)]
    assert len(said) == 1 and said[0].startswith("iteration 13: a loss spike: 12.5")
    assert spikes.look(18, _results([5.0])[0]) is False and spikes.spike is None
    assert said[1] == "iteration 18: loss 5.000000, the spike of 5 steps is over"
    off = LossSpikes(None, said.append)
    assert not any(off.look(i, r) for i, r in enumerate(_results([1.0] * 20 + [100.0])))


def _spike(config: Config, save: str) -> tuple[list[int], list[str]]:
    """Losses of steps 12 to 15 are told ten times as high; two checkpoints are kept."""
    original, number, said = trainer.train_step, [0], []

    def spiking(*args):
        result = original(*args)
        number[0] += 1
        if 12 <= number[0] <= 15:
            return dataclasses.replace(result, loss=10 * result.loss)
        return result

    trainer.train_step, say = spiking, trainer.Console.say
    trainer.Console.say = lambda self, line: said.append(line)
    try:
        config = change(config, "training", loss_spike_factor=3.0)
        run(change(config, "training", exit_interval=13))
        run(change(config, "checkpoint", load=save))
    finally:
        trainer.train_step, trainer.Console.say = original, say
    return folders.saved_iterations(Path(save)), said


def test_checkpoints_from_before_a_spike_stay_while_it_lasts(dataset: str, tmp_path: Path):
    config = tiny_config(
        dataset,
        checkpoint={"save": str(tmp_path), "save_interval": 1, "keep_last": 2},
        logging={"log_interval": 15},
    )
    config = change(config, "training", train_iters=15)
    ((saved, said),) = run_ranks(_spike, 1, config, str(tmp_path))
    assert saved == [10, 11, 14, 15]
    # The run that starts again in the middle of the spike knows of it.
    assert any("2 in a loss spike" in line for line in said)
    assert sum("a loss spike:" in line for line in said) == 1
    assert any("iteration 12: a loss spike" in line for line in said)


def test_what_a_checkpoint_says_of_spikes_is_what_a_run_wrote():
    spikes = LossSpikes(2.0, lambda line: None)
    for iteration, result in enumerate(_results([4.0] * 12 + [9.0])):
        spikes.look(iteration, result)
    state = spikes.state()
    assert state["spike"]["first_iteration"] == 12 and is_spike_state(state)
    assert LossSpikes(2.0, print, state).state() == state
    assert LossSpikes(None, print, state).state() is None and is_spike_state(None)
    for damaged in (
        {},
        [],
        state | {"losses": [float("nan")]},
        state | {"losses": [1.0] * 101},
        state | {"losses": ["1"]},
        state | {"spike": {"first_iteration": "1", "median": 1.0}},
        state | {"spike": {}},
    ):
        assert not is_spike_state(damaged), damaged


def _evaluate(config: Config) -> tuple[str, list[int]]:
    """Validation losses that are none from the second one on."""
    original, losses = trainer.evaluate_loss, [1.0]
    trainer.evaluate_loss = lambda *args, **kwargs: losses.pop() if losses else float("nan")
    told = "nothing"
    try:
        run(config)
    except TrainingError as error:
        told = str(error)
    finally:
        trainer.evaluate_loss = original
    return told, folders.saved_iterations(Path(str(config.checkpoint.save)))


def _evaluations(config: Config, root: str) -> list[tuple[str, list[int]]]:
    at_end = change(config, "training", eval_interval=100)
    return [
        _evaluate(change(config, "checkpoint", save=f"{root}/{number}"))
        for number, config in enumerate((config, at_end))
    ]


def test_a_validation_loss_that_is_not_finite_is_an_error(dataset: str, tmp_path: Path):
    checkpoint = {"save": str(tmp_path), "save_interval": 1, "keep_last": 1}
    config = tiny_config(dataset, checkpoint=checkpoint)
    config = change(config, "training", eval_iters=1, eval_interval=2, train_iters=3)
    (((amid, kept), (at_end, saved)),) = run_ranks(_evaluations, 1, config, str(tmp_path))
    assert amid.startswith("iteration 2: the validation loss is nan") and "saved as well" in amid
    # The weights are finite, and all that there is of the training; those before may be better.
    assert kept == [1, 2]
    assert at_end.startswith("iteration 3: the validation loss is nan") and saved == [3]
