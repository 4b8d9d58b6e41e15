"""tools/grow.py on trained checkpoints: what the function does, and the training that goes on.

A grown checkpoint's training is compared with the one that did not grow where the mathematics says
that they are the same, else on two ranks with on one.
"""

from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.conversion.growth import command
from megatron_memory.conversion.growth.half_keys import stretched_table
from megatron_memory.conversion.growth.probe import Change
from megatron_memory.conversion.megatron import read_megatron
from megatron_memory.conversion.verify import LogitsReport
from megatron_memory.memory.initialization import init_table_columns_
from tests.conversion.growth_runs import MODELS, STEPS, first_config, grow, next_config
from tests.distributed import run_ranks
from tests.training.tiny_runs import runs, write_dataset

TABLE = "memory.shared.values.weight"
SIZES = ("--memory-num-heads", 2, "--memory-top-k", 2, "--memory-num-half-keys", 8)
WIDER = ("--value-dim", 56, "--weights-only")
EXACT = ("--method", "exact", "--key-noise", 0)
LOSS = 2e-5
"""Between layouts, and between one row's weight and the sum of its copies': fp32's rounding, grown
by two steps of Adam."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """By name the training that wrote a checkpoint, in its `--save`."""
    root = tmp_path_factory.mktemp("trained")
    configs = {name: first_config(dataset, name, root / name) for name in MODELS}
    run_ranks(runs, 1, list(configs.values()))
    return configs


def _folder(config: Config) -> Path:
    assert config.checkpoint.save is not None
    return Path(config.checkpoint.save)


def _grown(trained: dict[str, Config], name: str, save: Path, *argv) -> str:
    """Grow a checkpoint; what was printed."""
    subcommand = "add-memory" if name == "dense" else "grow"
    code, text = grow(subcommand, "--load", _folder(trained[name]), "--save", save, *argv)
    assert code == 0, text
    return text


@pytest.mark.parametrize("variant", ["memory+", "pkm", "projected", "peer"])
def test_memory_beside_the_mlp_changes_no_bit(variant: str, trained, tmp_path: Path):
    flags = ["--memory-layers", "0,1", "--memory-beside-mlp", "--memory-gated", *SIZES]
    flags += ["--memory-variant", "pkm" if variant == "projected" else variant]
    flags += ["--memory-value-dim", 24] if variant == "projected" else []
    text = _grown(trained, "dense", tmp_path / "new", *flags)
    assert "largest difference 0 " in text and "--seed 1234" in text


def test_a_memory_in_place_of_the_mlp_begins_as_a_fresh_one(dataset: str, trained, tmp_path: Path):
    flags = ("--memory-layers", "1", "--replace", "--probe-data", dataset, "--seed", 5, *SIZES)
    text = _grown(trained, "dense", tmp_path / "new", *flags)
    assert "loss on 32 tokens: " in text and "largest difference 0 " not in text
    before, after = read_megatron(_folder(trained["dense"])), read_megatron(tmp_path / "new")
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" not in after.weights
    for tensors, theirs in ((after.weights, before.weights), *_moments(after, before)):
        norm = theirs["decoder.layers.1.mlp.linear_fc1.layer_norm_weight"].read()
        assert torch.equal(tensors["decoder.layers.1.pre_mlp_layernorm.weight"].read(), norm)
        kept = "decoder.layers.0.mlp.linear_fc1.weight"
        assert torch.equal(tensors[kept].read(), theirs[kept].read())
    table = torch.empty(64, 32)
    init_table_columns_([table], std=32**-0.5, first_column=0, seed=5, table_number=0)
    assert torch.equal(after.weights[TABLE].read(), table)
    assert not after.moments["exp_avg_sq"][TABLE].read().any()


def _moments(after, before):
    return [(after.moments[kind], before.moments[kind]) for kind in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("name", ["pkm", "memory+"])
def test_wider_rows_change_no_bit(name: str, trained, tmp_path: Path):
    """The second time, pkm's output is projected already."""
    text = _grown(trained, name, tmp_path / "new", "--value-dim", 48)
    assert "largest difference 0 " in text
    code, text = grow("grow", "--load", tmp_path / "new", "--save", tmp_path / "2", *WIDER)
    assert code == 0 and "largest difference 0 " in text, text
    before, after = read_megatron(_folder(trained[name])), read_megatron(tmp_path / "new")
    old = before.config.memory.value_dim
    assert after.config.memory.key_dim == before.config.memory.key_dim
    fresh = torch.empty(64, 48 - old)
    init_table_columns_([fresh], std=48**-0.5, first_column=old, seed=1234, table_number=0)
    assert torch.equal(after.weights[TABLE].read()[:, old:], fresh)
    _assert_moments_of_new_columns(after, TABLE, old)
    if name == "memory+":
        _assert_moments_of_new_columns(after, "decoder.layers.1.mlp.memory.linear_fc1.weight", old)


def test_peer_that_reads_all_copies_is_the_same_up_to_rounding(trained, tmp_path: Path):
    """The tool itself holds the logits to 1e-4 of the largest, or fails."""
    text = _grown(trained, "peer", tmp_path / "new", "--half-keys", 32, *EXACT)
    assert "top-1 agreement 32 of 32" in text and "--memory-top-k 32" in text


def _assert_moments_of_new_columns(state, name: str, old: int) -> None:
    moments = {kind: tensors[name].read() for kind, tensors in state.moments.items()}
    if name != TABLE:
        moments = {kind: rows.T for kind, rows in moments.items()}
    assert not moments["exp_avg"][:, old:].any()
    mean = moments["exp_avg_sq"][:, :old].mean(1, keepdim=True)
    assert mean.any()
    new = moments["exp_avg_sq"][:, old:]
    torch.testing.assert_close(new, mean.expand(-1, 48 - old), rtol=1e-6, atol=0)


@pytest.mark.distributed
def test_training_goes_on_as_without_growth_and_on_two_ranks(trained, tmp_path: Path):
    """The exact method, optimizer included, is the training that did not grow: sixteen or four
    copies of a row move as the row."""
    alone, grown = [], []
    _grown(trained, "memory+", tmp_path / "memory+", "--half-keys", 32, *EXACT)
    alone.append(next_config(trained["memory+"], _folder(trained["memory+"])))
    grown.append(_on_two_ranks(trained["memory+"], tmp_path / "memory+"))
    others = {
        "dense": ("--memory-layers", "1", "--memory-beside-mlp", *SIZES),
        "pkm": ("--value-dim", 48, "--half-keys", 16),
    }
    for name, flags in others.items():
        save = tmp_path / name
        _grown(trained, name, save, *flags, "--no-verify")
        alone.append(next_config(trained[name], save))
        grown.append(_on_two_ranks(trained[name], save))
    (expected,), (found, _) = run_ranks(runs, 1, alone), run_ranks(runs, 2, grown)
    for one, two in zip(expected, found, strict=True):
        assert one.iterations == two.iterations == [STEPS + 1, 2 * STEPS]
        assert two.losses == pytest.approx(one.losses, abs=LOSS)


def _on_two_ranks(first: Config, load: Path) -> Config:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    return next_config(first, load, use_distributed_optimizer=True, **parallel)


def test_new_rows_that_may_lose_are_told(trained, tmp_path: Path):
    text = _grown(trained, "bf16", tmp_path / "new", "--half-keys", 16)
    assert "new rows: " in text and "changes by at most" in text
    before, after = read_megatron(_folder(trained["bf16"])), read_megatron(tmp_path / "new")
    assert after.weights[TABLE].dtype == torch.bfloat16
    for tensors, theirs in (
        (after.main_weights, before.main_weights),
        (after.moments["exp_avg_sq"], before.moments["exp_avg_sq"]),
    ):
        assert torch.equal(tensors[TABLE].read(), stretched_table(theirs[TABLE], 8, 2).read())
    momentum = after.moments["exp_avg"][TABLE].read().view(16, 16, 32)
    old = before.moments["exp_avg"][TABLE].read().view(8, 8, 32)
    assert torch.equal(momentum[:8, :8], old) and old.any()
    assert not momentum[8:].any() and not momentum[:, 8:].any()


@pytest.mark.parametrize("name", ["pkm", "memory+"])
def test_new_half_keys_are_shorter_or_turned_with_noise(name: str, trained, tmp_path: Path):
    """Turned where keys are normalised. Of 256 numbers the root mean square's own deviation is 4.4%
    of it."""
    keys = {"pkm": "mlp.router.keys", "memory+": "mlp.memory.router.keys"}[name]
    found = {}
    for noise in (0, 0.01):
        save = tmp_path / str(noise)
        flags = ("--half-keys", 16, "--new-key-scale", 0.6, "--key-noise", noise, "--no-verify")
        _grown(trained, name, save, *flags)
        found[noise] = read_megatron(save).weights[f"decoder.layers.1.{keys}"].read()
    old, new = found[0].chunk(2, dim=2)
    assert torch.equal(old, found[0.01][:, :, :8])
    length = 0.6 if name == "pkm" else 1.0
    torch.testing.assert_close(new.norm(dim=-1), length * old.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(old, new, dim=-1)
    torch.testing.assert_close(cosine, torch.full_like(cosine, 1.0 if name == "pkm" else 0.6))
    noise = (found[0.01] - found[0])[:, :, 8:] / old.square().mean(-1, keepdim=True).sqrt()
    assert noise.square().mean().sqrt().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("difference", [0.1, float("nan")])
@pytest.mark.parametrize("subcommand", ["add-memory", "grow"])
def test_a_model_that_is_not_the_same_is_not_written(
    subcommand, difference, trained, tmp_path, monkeypatch
):
    differs = LogitsReport(
        largest_difference=difference, largest_logit=1.0, num_tokens=32, num_agreeing=31
    )
    change = Change(logits=differs, losses=None, new_reads=None)
    monkeypatch.setattr(command, "probe", lambda *_: change)
    name, flags = "pkm", ["--value-dim", 48]
    if subcommand == "add-memory":
        name, flags = "dense", ["--memory-layers", "1", "--memory-beside-mlp", *SIZES]
    load, save = _folder(trained[name]), tmp_path / "new"
    code, text = grow(subcommand, "--load", load, "--save", save, *flags)
    assert code == 2 and "Nothing is written" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("pkm", ("--half-keys", 24), "--half-keys 24: half-keys are doubled, from 8 now"),
        ("pkm", ("--half-keys", 65536), "to 46340 at most. Possible: 16, 32"),
        ("pkm", ("--half-keys", 16, "--method", "guess"), "must be one of exact, kept"),
        ("pkm", ("--new-key-scale", 1.5), "--new-key-scale is 1.5: it must be"),
        ("pkm", (), "give --half-keys for more rows"),
        ("pkm", ("--value-dim", 32), "--value-dim 32: the memory's is 32"),
        ("peer", ("--value-dim", 48), "their width is the hidden size, 32"),
        ("dense", ("--memory-layers", "1", *SIZES), "neither is given"),
        ("dense", ("--memory-layers", "1,2", "--replace", *SIZES), "--memory-layers"),
        ("dense", ("--memory-layer", "1"), "Did you mean --memory-layers"),
        ("dense", ("--replace",), "--memory-layers is missing"),
    ],
)
def test_what_cannot_grow_is_told(name: str, flags, says: str, trained, tmp_path: Path):
    subcommand = "add-memory" if name == "dense" else "grow"
    load = _folder(trained[name])
    code, text = grow(subcommand, "--load", load, "--save", tmp_path / "new", *flags)
    assert code == 2 and says in text, text
    assert list(tmp_path.iterdir()) == []


def test_memory_is_not_added_twice_and_nothing_is_overwritten(trained, tmp_path: Path):
    flags = ("--memory-layers", "1", "--replace", *SIZES)
    load = ("--load", _folder(trained["pkm"]))
    code, text = grow("add-memory", *load, "--save", tmp_path / "new", *flags)
    assert code == 2 and "has memory layers already (1)" in text
    code, text = grow("grow", *load, "--save", _folder(trained["peer"]), "--half-keys", 16)
    assert code == 2 and "is not empty" in text
    code, text = grow("shrink", *load)
    assert code == 2 and "begin with one of add-memory, grow" in text


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--memory-value-dim", 1, "--memory-key-dim 0, half of --memory-value-dim 1"),
        ("--memory-num-heads", 99999999999, "does not fit into this machine's memory"),
        ("--probe-sequences", 99999999999, "--probe-sequences is 99999999999"),
    ],
)
def test_sizes_that_cannot_be(flag: str, value: int, message: str, trained, tmp_path: Path):
    load, save = _folder(trained["dense"]), tmp_path / "new"
    argv = ("--memory-layers", 1, "--memory-beside-mlp", *SIZES, flag, value)
    if flag in SIZES:
        argv = (*argv[:3], *SIZES[2:], flag, value)
    code, text = grow("add-memory", "--load", load, "--save", save, *argv)
    assert code == 2 and message in text
    assert [*tmp_path.iterdir()] == []
