"""A run that goes on says what is different now, and does not repeat or omit data unasked."""

import re
import shutil
from pathlib import Path

import pytest

from megatron_memory.config import Config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training import program
from megatron_memory.training.checkpoint.changes import setting_changes
from megatron_memory.training.checkpoint.data_order import Part, as_plain, order_changes
from megatron_memory.training.progress import Console
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, runs, tiny_config, write_dataset

Outcome = tuple[str, list[float]]


def _outcomes(configs: list[Config]) -> list[Outcome]:
    """For each run what it said, errors included, and its losses."""
    said: list[str] = []
    Console.say = lambda self, line: said.append(line)
    outcomes: list[Outcome] = []
    for config in configs:
        said.clear()
        losses: list[float] = []
        try:
            losses = run(config).losses
        except CheckpointError as error:
            said.append(f"ERROR {error}")
        outcomes.append(("\n".join(said), losses))
    return outcomes


def _and_with_another_tokenizer(configs: list[Config]) -> list[Outcome]:
    """The first run once more, by a tokenizer that is another one by its hash."""
    outcomes = _outcomes(configs)
    program.hash_of = lambda tokenizer: "0" * 64
    return outcomes + _outcomes(configs[:1])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two datasets of other tokens: 80% of one hold some 120 samples, of the other 20."""
    folders = [tmp_path_factory.mktemp("data") for _ in range(2)]
    return [write_dataset(folders[0]), write_dataset(folders[1], num_documents=10)]


@pytest.fixture(scope="module")
def trained(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Config]:
    """Two iterations of eight, of one dataset and of a blend; each configuration goes on."""
    configs = []
    for data_path in ((data[0],), ("0.9", data[0], "0.1", data[1])):
        save = str(tmp_path_factory.mktemp("trained"))
        config = tiny_config(data[0], checkpoint={"save": save, "save_interval": 2})
        config = change(config, "data", data_path=data_path)
        configs.append(change(config, "training", exit_interval=2, train_iters=8))
    run_ranks(runs, 1, configs)
    plain, blend = (
        change(config, "checkpoint", load=config.checkpoint.save, save=None, save_interval=None)
        for config in configs
    )
    return plain, blend


def test_other_data_or_order_is_refused_and_the_rest_said(trained, data: list[str], tmp_path: Path):
    plain, blend = trained
    shutil.copytree(Path(data[0]).parent, tmp_path / "moved")
    moved = str(tmp_path / "moved" / "tokens")
    cases = {
        "same": (plain, None),
        "seed": (change(plain, "training", seed=7), "--seed 1234 there, 7 here"),
        "length": (change(plain, "model", seq_length=8), "--seq-length 16 there, 8 here"),
        "split": (change(plain, "data", split="50,50,0"), "--split 80,20,0 there, 50,50,0 here"),
        "files": (change(plain, "data", data_path=(data[1],)), "the files are other ones"),
        "passes": (change(plain, "training", train_iters=40), "1 pass over .* there, 3 here"),
        "longer": (change(plain, "training", train_iters=10), None),
        "moved": (change(plain, "data", data_path=(moved,)), None),
        "same blend": (blend, None),
        "weights": (
            change(blend, "data", data_path=("0.5", data[0], "0.5", data[1])),
            "samples of .* were used there",
        ),
        "blend to one": (change(blend, "data", data_path=(data[0],)), "2 datasets there, 1 here"),
        "passes of the smaller": (
            change(blend, "training", train_iters=30),
            f"1 pass over {data[1]} there",
        ),
    }
    seen = dict(zip(cases, run_ranks(_outcomes, 1, [c for c, _ in cases.values()])[0], strict=True))
    for name, (_, expected) in cases.items():
        said, losses = seen[name]
        if expected is None:
            assert "ERROR" not in said and losses, (name, said)
        else:
            error = said.partition("ERROR ")[2]
            assert error and not losses, (name, said)
            assert "has used 16 samples of other data" in error
            assert "--allow-changed-data-order" in error
            assert re.search(expected, error), (name, error)
    assert seen["same"][1] == seen["moved"][1]
    assert f"--data-path {data[0]} there, {moved} here" in seen["moved"][0]
    assert "changed since" not in seen["same"][0] and "changed since" not in seen["same blend"][0]


def test_with_the_flag_it_goes_on_and_says_so(trained, data: list[str]):
    plain = change(trained[0], "checkpoint", allow_changed_data_order=True)
    seeded = change(plain, "training", seed=7)
    other = change(plain, "optimizer", adam_beta1=0.8, clip_grad=0.5)
    other = change(change(other, "model", hidden_dropout=0.2), "memory", value_dropout=0.1)
    sgd = change(plain, "optimizer", optimizer="sgd")
    decay = change(plain, "optimizer", apply_weight_decay_to_all=True)
    fresh = change(sgd, "checkpoint", no_load_optim=True)
    finished = change(plain, "training", train_iters=2)
    finished = change(finished, "data", make_vocab_size_divisible_by=100)
    first, second, third, fourth, fifth, sixth, seventh = run_ranks(
        _and_with_another_tokenizer, 1, [seeded, other, sgd, decay, fresh, finished]
    )[0]
    assert "was trained with another tokenizer than this run's" in seventh[0] and seventh[1]
    assert "another tokenizer" not in first[0] + second[0]
    assert "nothing is left to train: --train-iters is 2" in sixth[0] and not sixth[1]
    assert "its 64 tokens are padded to 100" in sixth[0]
    assert "36 untrained rows take part in every loss" in sixth[0]
    assert "padded to" not in first[0] + second[0]
    assert "--allow-changed-data-order: samples may repeat" in first[0] and first[1]
    for line in (
        "--adam-beta1 0.9 there, 0.8 here",
        "--clip-grad 1.0 there, 0.5 here",
        "--hidden-dropout 0.0 there, 0.2 here",
        "--memory-value-dropout 0.0 there, 0.1 here",
    ):
        assert second[0].count(line) == 1
    assert "may repeat" not in second[0] and second[1]
    assert "ERROR" in third[0] and "--optimizer adam there, sgd here" in third[0]
    assert "ERROR" in fourth[0] and "--apply-weight-decay-to-all False there" in fourth[0]
    assert "ERROR" not in fifth[0] and fifth[1]


def test_every_setting_is_compared_or_known_not_to_matter(trained):
    config = trained[0]
    changed = change(config, "precision", bf16=True)
    changed = change(changed, "data", eod_mask_loss=True)
    changed = change(changed, "training", eval_iters=3, global_batch_size=16)
    lines = list(setting_changes(config, changed))
    assert sorted(lines) == [
        "--bf16 False there, True here",
        "--eod-mask-loss False there, True here",
        "--global-batch-size 8 there, 16 here",
    ]
    rate = change(config, "optimizer", lr=1.0)
    assert list(setting_changes(config, rate)) == ["--lr 0.01 there, 1.0 here"]
    kept = change(rate, "optimizer", use_checkpoint_opt_param_scheduler=True)
    assert list(setting_changes(config, kept)) == []


def test_only_what_is_read_decides():
    part = Part(prefix="a", fingerprint="f", num_passes=1, num_used=8, digest="d")
    assert order_changes(as_plain([part]), [part]) == []
    other = Part(prefix="b", fingerprint="f", num_passes=1, num_used=8, digest="e")
    assert order_changes(as_plain([part]), [other]) == ["the samples of b come in another order"]
    assert order_changes([{"prefix": "a"}], [part]) == [
        "the checkpoint's record of its data is damaged"
    ]
    assert order_changes(3, [part]) == ["the checkpoint's record of its data is damaged"]
