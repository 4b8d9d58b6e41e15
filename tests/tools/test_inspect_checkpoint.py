"""tools/inspect_checkpoint.py on checkpoints of every format, whole and damaged."""

import argparse
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch

from megatron_memory.conversion.dcp_files import StoredTensors
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from tests.inspection.saved import VOCAB_SIZE, changed, save, tiny_state
from tests.tiny import one_rank  # noqa: F401
from tests.training.checkpoint.damages import KINDS
from tools import inspect_checkpoint

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def state(one_rank) -> SavedState:  # noqa: F811
    return tiny_state()


@pytest.fixture(scope="module")
def folders(state: SavedState, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    dense = tiny_state(None)
    return {
        "megatron": save(state, "megatron", root / "megatron"),
        "lingua": save(state, "lingua", root / "lingua"),
        "hf": save(dense, "hf", root / "hf"),
    }


def _run(capsys, *argv: object) -> tuple[int, str]:
    code = inspect_checkpoint.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def _json(capsys, *argv: object) -> tuple[int, dict]:
    code, text = _run(capsys, *argv, "--json")
    return code, json.loads(text)


def test_megatron(folders, state: SavedState, capsys):
    code, found = _json(capsys, folders["megatron"])
    assert code == 0
    assert (found["format"], found["iteration"], found["consumed_samples"]) == ("megatron", 7, 56)
    assert found["consumed_tokens"] == 56 * 16
    assert (found["vocab_size"], found["padded_vocab_size"]) == (VOCAB_SIZE, 128)
    assert found["optimizer"] == {"states": ["exp_avg", "exp_avg_sq"], "step": 7}
    assert found["configuration"]["memory_num_half_keys"] == 8
    assert found["layout"]["tensor"] == 1
    assert not found["damage"]
    parts = found["parameters"]
    assert sum(parts.values()) == sum(math.prod(t.shape) for t in state.weights.values())
    assert parts["memory values"] == 64 * 32
    assert parts["memory keys"] == 2 * 2 * 2 * 8 * 8
    assert parts["memory queries"] == 2 * (32 * 32 + 32)
    assert parts["memory projections"] == 2 * 2 * (32 * 32 + 32)
    assert parts["embedding"] == parts["output layer"] == VOCAB_SIZE * 32
    memory = sum(count for part, count in parts.items() if part.startswith("memory"))
    assert found["memory_share"] == memory / sum(parts.values())
    name = "decoder.layers.1.mlp.router.keys"
    tensor, exact = found["tensors"][name], state.weights[name].read().double()
    assert (tensor["shape"], tensor["dtype"]) == ([2, 2, 8, 8], "fp32")
    assert tensor["norm"] == pytest.approx(exact.norm().item(), rel=1e-12)
    assert f"optimizer.state.exp_avg_sq.{name}" in found["tensors"]


def test_every_format_is_found_and_says_the_same(folders, capsys):
    code, lingua = _json(capsys, folders["lingua"])
    _, megatron = _json(capsys, folders["megatron"])
    assert (code, lingua["format"]) == (0, "lingua")
    # Queries and keys have their rows in another order there: other bytes, other rounding.
    counted = {name for name in megatron["tensors"] if name.startswith("memory_usage.")}
    assert len(counted) == 2
    for name, tensor in megatron["tensors"].items():
        if name in counted:
            continue
        other = lingua["tensors"][name]
        assert other["shape"] == tensor["shape"], name
        for figure in ("norm", "mean", "lowest", "highest", "num_zeros"):
            assert other[figure] == pytest.approx(tensor[figure], rel=1e-12, abs=1e-12), name
    assert lingua["parameters"] == megatron["parameters"]
    assert [len(found["names"]) for found in lingua["duplicates"]] == [2]
    assert lingua["duplicates"][0]["reason"] and not megatron["duplicates"]
    code, hf = _json(capsys, folders["hf"])
    assert (code, hf["format"], hf["vocab_size"]) == (0, "hf", VOCAB_SIZE)
    assert hf["parameters"]["MLP"] == 4 * 3 * 32 * hf["configuration"]["ffn_hidden_size"]


def test_text(folders, capsys):
    code, text = _run(capsys, "--load", folders["megatron"], "--tensors", "*.router.keys")
    assert code == 0
    for words in (
        "iteration 7, 56 samples, 896 tokens",
        "--memory-num-half-keys 8",
        f"{VOCAB_SIZE} tokens, padded to 128",
        "step 7, exp_avg, exp_avg_sq",
        "6 tensors",
        "2x2x8x8",
    ):
        assert words in text
    assert "--moe-" not in text and "linear_qkv" not in text
    code, text = _run(capsys, folders["megatron"], "--no-values")
    assert code == 0 and "linear_qkv" in text and "norm " not in text


def test_slot_usage(folders, state: SavedState, capsys):
    _, found = _json(capsys, folders["megatron"])
    sums = state.usage["memory_usage.layers.3.weight_sums"].read()
    assert list(found["slot_usage"]) == ["1", "3"]
    usage = found["slot_usage"]["3"]
    assert (usage["num_slots"], usage["num_never_read"]) == (64, 0)
    assert usage["share_of_top_percent"] == pytest.approx((sums.max() / sums.sum()).item())
    code, text = _run(capsys, folders["megatron"], "--raw", "--tensors", "memory_usage.*")
    assert code == 0 and "slots read after 8 samples" in text and "layer 3: 0 of 64" in text


def test_raw_names(folders, capsys):
    code, found = _json(capsys, folders["lingua"], "--raw", "--tensors", "model.*")
    assert code == 0
    assert found["names"] == "files"
    assert "model.layers.1.feed_forward.keys" in found["tensors"]
    assert [group["reason"] is None for group in found["duplicates"]] == [False]
    code, found = _json(capsys, folders["megatron"], "--raw")
    assert found["tensors"]["embedding.word_embeddings.weight"]["shape"] == [128, 32]


def test_what_is_wrong_with_the_numbers(state: SavedState, tmp_path: Path, capsys):
    table = state.weights["memory.shared.values.weight"].read().clone()
    table[5], table[7], table[9] = 0, table[8], table[8]
    keys = state.weights["decoder.layers.3.mlp.router.keys"].read().clone()
    keys[1, 1, 2] = 0
    proj = "decoder.layers.{}.self_attention.linear_proj.weight"
    odd = state.weights[proj.format(0)].read().clone()
    odd[0, 0], odd[1, 1] = math.nan, math.inf
    wrong = changed(
        state,
        memory_shared_values_weight=table,
        decoder_layers_3_mlp_router_keys=keys,
        decoder_layers_0_self_attention_linear_proj_weight=odd,
        decoder_layers_1_self_attention_linear_proj_weight=state.weights[proj.format(2)].read(),
        decoder_layers_3_self_attention_linear_proj_weight=torch.zeros(32, 32),
    )
    folder = save(wrong.without_optimizer(), "megatron", tmp_path / "wrong")
    code, found = _json(capsys, folder)
    assert code == 1
    assert found["damage"] == [f"{proj.format(0)} has 1 NaN and 1 infinite numbers"]
    assert found["tensors"][proj.format(0)]["num_nan"] == 1
    (group,) = found["duplicates"]
    assert group == {
        "names": [proj.format(1), proj.format(2)],
        "num_bytes": 4096,
        "reason": None,
    }
    notes = "\n".join(found["notes"])
    for words in ("1 rows are zero", "2 rows repeat", "1 half-keys", f"zeros: {proj.format(3)}"):
        assert words in notes
    code, _ = _json(capsys, folder, "--tensors", "*.router.*")
    assert code == 0


def test_copies_of_a_table_that_differ(folders, tmp_path: Path, capsys):
    iteration = folders["lingua"] / "checkpoints" / "0000000007"
    tensors = StoredTensors(iteration, read_metadata(iteration)).tensors()
    model = {n.removeprefix("model."): t.read() for n, t in tensors.items() if "model." in n}
    shutil.copy(iteration / "params.json", tmp_path)
    torch.save({"model": model}, tmp_path / "consolidated.pth")
    assert _run(capsys, tmp_path)[0] == 0
    model["layers.3.feed_forward.values.weight"][0, 0] += 1
    torch.save({"model": model}, tmp_path / "consolidated.pth")
    code, found = _json(capsys, tmp_path)
    assert code == 1
    assert found["damage"] == [
        "layers.3.feed_forward.values.weight is to be a copy of memory.shared.values.weight, and "
        "differs from it"
    ]


def test_damaged_and_foreign_checkpoints_are_shown_by_their_files(folders, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(folders["megatron"], folder)
    iteration = folder / "iter_0000007"
    (iteration / "config.yaml").unlink()
    code, text = _run(capsys, folder)
    assert code == 1 and "config.yaml is missing" in text and "router.keys" in text
    assert "iteration 7" in text
    assert _run(capsys, folder, "--raw")[0] == 0
    # As Megatron-LM's own, under any name.
    torch.save({"args": argparse.Namespace(lr=1), "iteration": 3}, iteration / "common.pt")
    code, text = _run(capsys, iteration.rename(tmp_path / "renamed"), "--raw")
    assert code == 0 and "no config.yaml" in text and "iteration 3" in text
    (tmp_path / "renamed" / "common.pt").write_bytes(b"PK")
    code, text = _run(capsys, tmp_path / "renamed", "--raw")
    assert code == 1 and "common.pt is damaged" in text
    stored = next((tmp_path / "renamed").glob("*.distcp"))
    stored.write_bytes(stored.read_bytes()[: stored.stat().st_size // 2])
    code, text = _run(capsys, tmp_path / "renamed", "--raw")
    assert code == 1 and "is truncated" in text and "cannot be read" in text
    assert "embedding.word_embeddings.weight" in text


def test_incomplete_hf_folder(tmp_path: Path, one_rank, capsys):  # noqa: F811
    from megatron_memory.conversion.hf import write_hf

    folder = tmp_path / "hf"
    folder.mkdir()
    write_hf(tiny_state(None).without_optimizer(), folder, max_shard_bytes=40_000)
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    code, text = _run(capsys, folder)
    assert code == 1 and f"{lost} is missing" in text and "model.embed_tokens.weight" in text
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    code, text = _run(capsys, folder)
    assert code == 1 and "unheard_of" in text and "model.embed_tokens.weight" in text


def test_errors(tmp_path: Path, folders, capsys):
    for argv, words in (
        ([], "0 checkpoints are named"),
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "no checkpoint of a format"),
        ([tmp_path, "--load", tmp_path], "twice"),
        ([folders["megatron"], "--tensors", "*.nothing"], "matches none of the tensors"),
        ([folders["megatron"], "--format", "hf"], "holds no weights"),
    ):
        code, text = _run(capsys, *argv)
        assert code == 2 and words in text, text


def test_verify_names_what_is_not_what_was_written(folders, tmp_path: Path, capsys):
    copy = shutil.copytree(folders["megatron"], tmp_path / "copy")
    code, found = _json(capsys, copy, "--verify", "--no-values")
    assert code == 0 and "every file is what was written" in found["notes"]
    (file,) = copy.glob("iter_*/*.distcp")
    KINDS["flip"](file.parent, file, random.Random(6))
    code, found = _json(capsys, copy, "--no-values")
    assert code == 0, "no tensor is read"
    code, found = _json(capsys, copy, "--verify", "--no-values")
    assert code == 1 and f"{file} is damaged" in found["damage"][0]
    (file.parent / "integrity.json").unlink()
    code, found = _json(capsys, copy, "--verify", "--no-values")
    assert code == 1 and "integrity.json is missing" in found["damage"][0]
    code, found = _json(capsys, folders["hf"], "--verify", "--no-values")
    assert code == 0 and "no checksums" in found["notes"][0]
    code, text = _run(capsys, "--diff", folders["hf"], folders["hf"], "--verify")
    assert code == 2 and "--verify looks at one" in text
