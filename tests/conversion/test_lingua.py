"""The public reference's checkpoints: its own logits, tensors and optimizer states."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_memory.config import CheckpointConfig
from megatron_memory.conversion.convert import convert
from megatron_memory.conversion.dcp_files import StoredTensors
from megatron_memory.conversion.evaluate import megatron_logits, state_logits
from megatron_memory.conversion.lingua import lingua_rules, read_lingua, write_lingua
from megatron_memory.conversion.lingua_params import params_of
from megatron_memory.conversion.megatron import read_megatron
from megatron_memory.conversion.verify import check_twins
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.checksums import write_sums
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from tests.conversion.states import assert_same_tensors, conversion, golden_checkpoint, read_all
from tests.distributed import run_ranks
from tests.golden_lingua import CASES, load_case
from tests.reference_run import save_like_reference

TOLERANCE = 1e-4


def _is_reference(logits: torch.Tensor, name: str) -> bool:
    expected = load_case(name)[1]["eval.logits"]
    assert logits.shape == expected.shape
    return bool((logits - expected).abs().max() < TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_bits_through_megatron_and_back(name: str, tmp_path: Path):
    golden, megatron, back = golden_checkpoint(name), tmp_path / "megatron", tmp_path / "back"
    tokens = load_case(name)[1]["eval.tokens"]
    assert _is_reference(state_logits(read_lingua(golden), torch.float32, tokens), name)
    convert(
        conversion("lingua", golden, "megatron", megatron, target_tensor_parallel_size=2), print
    )
    assert _is_reference(megatron_logits(megatron, tokens), name)
    convert(conversion("megatron", megatron, "lingua", back, verify=True), print)
    assert _is_reference(state_logits(read_lingua(back), torch.float32, tokens), name)

    ours, theirs = (
        StoredTensors(folder, read_metadata(folder))
        for folder in (back / "checkpoints" / "0000000024", golden)
    )
    assert_same_tensors(read_all(ours.tensors()), read_all(theirs.tensors()))
    assert ours.objects().keys() == theirs.objects().keys()
    for key, place in theirs.objects().items():
        # The rate follows from the schedule, which the golden's params.json does not tell.
        if not key.endswith(".lr"):
            assert ours.read_object(ours.objects()[key]) == theirs.read_object(place), key


def test_params_make_the_same_model(tmp_path: Path):
    """What the reference builds its model from, but for the MLP's width, which it computes."""
    for name in CASES:
        golden = golden_checkpoint(name)
        convert(conversion("lingua", golden, "lingua", tmp_path / name), print)
        written = tmp_path / name / "checkpoints" / "0000000024" / "params.json"
        ours, theirs = (json.loads(p.read_text()) for p in (written, golden / "params.json"))
        for params in (ours, theirs):
            model = params["model"]
            usual = int(2 * 4 * model["dim"] / 3)
            multiple = model.pop("multiple_of")
            model["width"] = -(-usual // multiple) * multiple
            model.pop("seed")
        assert ours["model"] == theirs["model"]
        assert ours["optim"] == pytest.approx(theirs["optim"])


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_consolidated_checkpoint_is_the_same(has_optimizer: bool, tmp_path: Path):
    """Made as the reference makes it, by torch's own function; and of the model alone."""
    golden = golden_checkpoint("memory_plus")
    consolidated = tmp_path / "0000000024" / "consolidated"
    consolidated.mkdir(parents=True)
    dcp_to_torch_save(golden, consolidated / "consolidated.pth")
    shutil.copy(golden / "params.json", consolidated)
    if not has_optimizer:
        model = torch.load(consolidated / "consolidated.pth", weights_only=True)["model"]
        torch.save(model, consolidated / "consolidated.pth")
    found, expected = read_lingua(consolidated), read_lingua(golden)
    assert_same_tensors(read_all(found.weights), read_all(expected.weights))
    assert found.iteration == expected.iteration == 24
    assert set(found.moments) == ({"exp_avg", "exp_avg_sq"} if has_optimizer else set())
    for kind, moments in found.moments.items():
        assert_same_tensors(read_all(moments), read_all(expected.moments[kind]))


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["memory_gqa_vdim", "peer"])
def test_optimizer_state_is_that_of_our_training(name: str, tmp_path: Path):
    """Our 24 steps from the reference's initial weights make the moments that it saved."""
    run_ranks(save_like_reference, 1, name, tmp_path)
    ours, theirs = read_megatron(tmp_path), read_lingua(golden_checkpoint(name))
    assert ours.moments.keys() == theirs.moments.keys() == {"exp_avg", "exp_avg_sq"}
    for kind, moments in theirs.moments.items():
        assert moments.keys() == ours.moments[kind].keys()
        for key, moment in read_all(moments).items():
            # The losses of both agree to 1e-4 too (tests/training/test_parity_reference.py).
            error = (ours.moments[kind][key].read() - moment).norm() / moment.norm()
            assert error < 1e-3, (kind, key)


def test_run_directory_means_its_newest_checkpoint(tmp_path: Path):
    runs = tmp_path / "checkpoints"
    shutil.copytree(golden_checkpoint("memory_plus"), runs / "0000000024")
    older = dataclasses.replace(read_lingua(golden_checkpoint("peer")), iteration=8)
    write_lingua(older, tmp_path)
    assert read_lingua(tmp_path).config.memory.variant == "memory+"
    assert read_lingua(runs / "0000000008").config.memory.variant == "peer"


def test_an_optimizer_of_another_step_is_refused(tmp_path: Path):
    """Its corrections would be those of the wrong step."""
    folder = tmp_path / "0000000023"
    shutil.copytree(golden_checkpoint("peer"), folder)
    position = folder / "train_state_00000.json"
    position.write_text(position.read_text().replace('"step": 24', '"step": 23'))
    with pytest.raises(CheckpointError, match="count different steps, 23, 24"):
        read_lingua(folder)


def test_copies_of_a_shared_table_are_compared_without_verification(tmp_path: Path):
    """Weights and the optimizer's states alike: the reference stores each with every layer."""
    state = read_lingua(golden_checkpoint("memory_plus"))
    damaged = [dataclasses.replace(state, twins=(twin,)) for twin in state.twins]
    assert damaged
    for one in damaged:
        ((name, table, copy),) = one.twins
        other = dataclasses.replace(copy, read_rows=lambda b, e, c=copy: c.read_rows(b, e) + 1)
        with pytest.raises(CheckpointError, match=re.escape(name)):
            check_twins(dataclasses.replace(one, twins=((name, table, other),)))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"new_gate": 2.0}, "new_gate: nothing is known"),
        ({"vocab_size": 300}, "vocab_size 300, and the embedding has 258 rows"),
        ({"productkey_args": {"is_enabled": True, "mem_new": 1}}, "productkey_args.mem_new"),
        ({"sliding_window": 512}, "sliding_window 512"),
        ({"rope_theta": 10000.5}, "rope_theta 10000.5"),
        ({"n_layers": 5}, "layers.4.attention_norm.weight"),
        ({"n_layers": None}, "params.json"),
        ({"n_kv_heads": 2}, "do not have the shapes"),
        ({"weight_tying": True}, "output.weight"),
        ({"productkey_args": {"is_enabled": False}}, "feed_forward.keys"),
    ],
)
def test_params_that_do_not_fit_are_refused(changes: dict, part: str, tmp_path: Path):
    folder = tmp_path / "0000000024"
    shutil.copytree(golden_checkpoint("memory_plus"), folder)
    params = json.loads((folder / "params.json").read_text())
    params["model"] |= changes
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError) as caught:
        read_all(read_lingua(folder).weights)
    assert part in str(caught.value)


@pytest.mark.parametrize("flag", ["--memory-qk-norm", "--memory-softmax-sink"])
def test_models_that_the_reference_lacks_are_refused(flag: str, tmp_path: Path):
    convert(
        conversion("lingua", golden_checkpoint("peer"), "megatron", tmp_path / "megatron"), print
    )
    (config,) = tmp_path.glob("megatron/iter_*/config.yaml")
    key = flag.removeprefix("--").replace("-", "_")
    config.write_text(config.read_text().replace(f"{key}: false", f"{key}: true"))
    write_sums(config.parent, CheckpointConfig().checksums)
    with pytest.raises(CheckpointError, match=flag):
        convert(conversion("megatron", tmp_path / "megatron", "lingua", tmp_path / "out"), print)
    assert not (tmp_path / "out").exists()


def test_rotary_scaling_and_tables_of_some_layers_are_refused():
    config = read_lingua(golden_checkpoint("memory_plus")).config
    scaled = dataclasses.replace(config.model, use_rope_scaling=True)
    with pytest.raises(CheckpointError, match="--use-rope-scaling"):
        lingua_rules(dataclasses.replace(config, model=scaled))
    grouped = dataclasses.replace(config.memory, share_scope="stage", share_groups="1,2;3")
    with pytest.raises(CheckpointError, match="several tables, some of them of several layers"):
        lingua_rules(dataclasses.replace(config, memory=grouped))


@pytest.mark.parametrize(
    ("groups", "are_shared"), [("1,2,3", True), ("1;2;3", False)], ids=["one", "each"]
)
def test_groups_that_the_reference_knows_are_written(groups: str, are_shared: bool):
    config = read_lingua(golden_checkpoint("memory_plus")).config
    memory = dataclasses.replace(config.memory, share_scope="stage", share_groups=groups)
    config = dataclasses.replace(config, memory=memory)
    assert lingua_rules(config)
    args = params_of(config, 64)["model"]["productkey_args"]
    assert args["mem_share_values"] is are_shared
