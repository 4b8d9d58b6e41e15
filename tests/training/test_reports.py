"""What a training reports: evaluation, curves, lines, usage and speed."""

import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_memory.config import Config
from megatron_memory.memory.usage import UsageFigures
from megatron_memory.training import trainer
from megatron_memory.training.metrics import Interval, Report
from megatron_memory.training.progress import duration, report_line
from megatron_memory.training.step import StepResult
from megatron_memory.training.throughput import model_flops_utilization, peak_tflops
from tests.distributed import run_ranks
from tests.training.tiny_runs import BATCH, SEQUENCE, change, run, tiny_config

MEMORY = {"layers": "0,1", "num_heads": 2, "top_k": 4, "num_half_keys": 8}


def _curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(point.step, point.value) for point in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def _reported(config: Config) -> tuple[list, list[Report], list[str]]:
    reports, lines = [], []
    original = trainer.report_line

    def keep(report, train_iters):
        reports.append(report)
        return original(report, train_iters)

    trainer.report_line = keep
    trainer.Console.say = lambda self, line: lines.append(line)
    seen = run(config)
    return [seen.losses, seen.norms, seen.learning_rates], reports, lines


def _reporting(dataset: str, folder: Path, **parallel) -> Config:
    config = tiny_config(dataset, memory=MEMORY, parallel={"device": "cpu"} | parallel)
    config = change(config, "training", train_iters=5, eval_iters=2, eval_interval=3)
    config = change(config, "logging", log_interval=2, tensorboard_dir=str(folder))
    return change(config, "data", split="60,20,20")


def test_curves_hold_every_figure(dataset: str, tmp_path: Path):
    config = _reporting(dataset, tmp_path / "curves")
    (losses, norms, rates), reports, lines = run_ranks(_reported, 1, config)[0]
    curves = _curves(tmp_path / "curves")
    means = [sum(losses[0:2]) / 2, sum(losses[2:4]) / 2, losses[4]]
    assert curves["loss/train"] == [
        (step, pytest.approx(mean, abs=1e-6)) for step, mean in zip((2, 4, 5), means, strict=True)
    ]
    expected = {
        "gradient_norm/model": [norm for norm, _ in norms],
        "gradient_norm/values": [norm for _, norm in norms],
        "learning_rate/model": [rate for rate, _ in rates],
        "learning_rate/values": [rate for _, rate in rates],
    }
    for tag, values in expected.items():
        points = [(step, pytest.approx(values[step - 1], rel=1e-6)) for step in (2, 4, 5)]
        assert curves[tag] == points
    assert [step for step, _ in curves["loss/validation"]] == [0, 3, 5]
    assert [step for step, _ in curves["loss/test"]] == [5]
    assert curves["loss/validation"][0][1] == pytest.approx(math.log(64), abs=0.1)
    for tag in ("tokens_per_second", "ms_per_iteration", "tflops_per_device"):
        assert all(value > 0 for _, value in curves[f"speed/{tag}"])
    assert "speed/mfu" not in curves
    for name in ("layer_0", "layer_1", "pool"):
        assert all(0 < share <= 1 for _, share in curves[f"slots_read/{name}"])
        assert all(kl >= 0 for _, kl in curves[f"slots_kl_to_uniform/{name}"])
    first = reports[0]
    tokens = BATCH * SEQUENCE
    assert first.tokens_per_second == pytest.approx(tokens / first.seconds_per_iteration)
    assert any("MFU n/a" in line and "left" in line for line in lines)


def test_ranks_report_the_same_usage_and_loss_as_one(dataset: str, tmp_path: Path):
    one = run_ranks(_reported, 1, _reporting(dataset, tmp_path / "one"))[0]
    layouts = {
        "dp2": {},
        "tp2": {"tensor_model_parallel_size": 2},
        "sp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    }
    for name, parallel in layouts.items():
        two = run_ranks(_reported, 2, _reporting(dataset, tmp_path / name, **parallel))
        for _, reports, _ in two:
            for a, b in zip(one[1], reports, strict=True):
                assert a.loss == pytest.approx(b.loss, abs=1e-4)
                assert a.usage.keys() == b.usage.keys() == {"layer_0", "layer_1", "pool"}
                for layer, figures in a.usage.items():
                    theirs = b.usage[layer]
                    assert figures.share_of_slots_read == theirs.share_of_slots_read
                    assert figures.kl_to_uniform == pytest.approx(theirs.kl_to_uniform, abs=1e-3)


def test_overwritten_iterations_are_hidden_in_the_curves(dataset: str, tmp_path: Path):
    save = str(tmp_path / "save")
    config = _reporting(dataset, tmp_path / "curves")
    config = change(change(config, "checkpoint", save=save, save_interval=2), "data", split="1,1,1")
    run_ranks(_reported, 1, change(config, "training", exit_interval=3))
    resumed = change(config, "checkpoint", load=f"{save}/iter_0000002")
    run_ranks(_reported, 1, resumed)
    steps = [step for step, _ in _curves(tmp_path / "curves")["loss/train"]]
    assert steps == [2, 4, 5]


def _report(**changes) -> Report:
    step = StepResult(
        loss=2.0,
        num_tokens=64.0,
        grad_norm=1.5,
        value_grad_norm=0.25,
        learning_rate=1e-3,
        value_learning_rate=2e-3,
        skipped=False,
    )
    figures = dict(
        iteration=20,
        loss=2.125,
        last=step,
        num_skipped=0,
        num_spikes=0,
        seconds_per_iteration=0.5,
        tokens_per_second=12345.6,
        tflops_per_device=321.0,
        mfu=0.4123,
        memory_gib=7.5,
        seconds_left=3723.0,
        usage={"layer_4": UsageFigures(share_of_slots_read=0.5, kl_to_uniform=1.25)},
    )
    return Report(**(figures | changes))


def test_report_line():
    assert report_line(_report(), 1000) == (
        "iteration   20/1000 | loss 2.125000 | grad norm 1.5000 (values 0.2500) | "
        "lr 1.000e-03 (values 2.000e-03) | 12,346 tokens/s | 500.0 ms/iteration | "
        "321 TFLOP/s a device, MFU 41.2% | 7.50 GiB | slots read layer 4 50.0% KL 1.25 | "
        "1:02:03 left"
    )


def test_duration():
    shown = {0.4: "0:00", 59.6: "1:00", 3599: "59:59", 3600: "1:00:00", 90061: "1d 1:01:01"}
    assert {seconds: duration(seconds) for seconds in shown} == shown


def test_peaks_are_chosen_by_the_whole_name():
    names = {
        "NVIDIA H100 80GB HBM3": 989.5,
        "NVIDIA H100 PCIe": 756.5,
        "NVIDIA H100 NVL": 835.5,
        "NVIDIA H200": 989.5,
        "NVIDIA H200 NVL": 835.5,
        "NVIDIA GH200 480GB": 989.5,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA A10": 125.0,
        "NVIDIA A40": 149.7,
        "NVIDIA L4": 121.0,
        "NVIDIA L40S": 362.05,
        "NVIDIA B200": 2250.0,
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 2080": None,
        "NVIDIA L40": None,
    }
    assert {name: peak_tflops(name) for name in names} == names


def test_no_utilization_without_a_known_peak():
    assert model_flops_utilization(100.0, torch.device("cpu"), torch.bfloat16) is None
    assert model_flops_utilization(100.0, torch.device("cuda", 0), torch.float32) is None


def test_interval_means():
    """A token weighs the same in every step; a step without tokens or update nothing."""
    interval = Interval()
    steps = ((1.0, 30.0, False), (2.0, 10.0, False), (0.0, 0.0, False), (math.nan, 10.0, True))
    for loss, num_tokens, skipped in steps:
        changes = {"loss": loss, "num_tokens": num_tokens, "skipped": skipped}
        interval.add(StepResult(**{**vars(_report().last), **changes}), seconds=0.25)
    assert (interval.loss, interval.num_skipped, interval.seconds) == (1.25, 1, 1.0)
    empty = Interval()
    empty.add(StepResult(**{**vars(_report().last), "loss": 0.0, "num_tokens": 0.0}), seconds=0.25)
    assert math.isnan(empty.loss)
