"""A checkpoint that cannot be loaded says why, and which one can be."""

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_memory.config import Config, save_config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.finding import find_checkpoint, read_common
from megatron_memory.training.checkpoint.integrity import check_whole
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from megatron_memory.training.checkpoint.reader import _CheckedReader
from tests.distributed import run_ranks
from tests.lines import COMMON_FILES
from tests.training.tiny_runs import VOCAB, change, runs, tiny_config


def _save_and_keep(config: Config) -> None:
    runs([config])


@pytest.fixture(scope="module")
def written(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """Checkpoints of iterations 2 and 4, and the configuration that wrote them."""
    folder = tmp_path_factory.mktemp("written")
    config = tiny_config(
        dataset,
        checkpoint={"save": str(folder), "save_interval": 2},
        training={"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 4, "eval_iters": 0},
    )
    run_ranks(_save_and_keep, 1, config)
    return config, folder


@pytest.fixture
def checkpoints(written: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    """A copy to damage."""
    config, folder = written
    copy = tmp_path / "checkpoints"
    shutil.copytree(folder, copy)
    return config, copy


def test_whole_checkpoint_is_found(checkpoints):
    config, folder = checkpoints
    found = find_checkpoint(folder, config, VOCAB)
    assert found.folder == folder / "iter_0000004"
    assert found.common["iteration"] == 4 and found.common["consumed_samples"] == 32
    assert found.shapes["memory.shared.values.weight"] == (64, 32)
    assert find_checkpoint(folder / "iter_0000002", config, VOCAB).common["iteration"] == 2
    assert find_checkpoint(folder / "nothing", config, VOCAB) is None


@pytest.mark.parametrize(
    "name", [".metadata", *COMMON_FILES, "metadata.json", "__0_0.distcp", "__0_1.distcp"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "last byte"])
def test_damaged_checkpoint_names_the_file_and_an_older_one(name: str, damage: str, checkpoints):
    config, folder = checkpoints
    path = folder / "iter_0000004" / name
    if damage == "missing":
        path.unlink()
    else:
        size = path.stat().st_size
        os.truncate(path, {"empty": 0, "half": size // 2, "last byte": size - 1}[damage])
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(folder, config, VOCAB)
    message = str(caught.value)
    assert str(path) in message
    assert f"Complete is iteration 2: --load {folder / 'iter_0000002'}" in message


def test_all_damaged(checkpoints):
    config, folder = checkpoints
    for iteration in ("iter_0000002", "iter_0000004"):
        (folder / iteration / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="There is no complete checkpoint"):
        find_checkpoint(folder, config, VOCAB)


def test_tracker_to_a_deleted_checkpoint_and_missing_tracker(checkpoints):
    config, folder = checkpoints
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text("6\n")
    with pytest.raises(CheckpointError, match="iter_0000006.*Complete is iteration 4"):
        find_checkpoint(folder, config, VOCAB)
    tracker.unlink()
    assert find_checkpoint(folder, config, VOCAB).folder == folder / "iter_0000004"


ARCHITECTURES = [
    ("model", {"hidden_size": 64}, "--hidden-size 32 there, 64 here"),
    ("model", {"num_layers": 3}, "--num-layers 2 there, 3 here"),
    ("model", {"num_attention_heads": 8}, "--num-attention-heads 4 there, 8 here"),
    ("model", {"normalization": "LayerNorm"}, "--normalization RMSNorm there, LayerNorm here"),
    ("model", {"swiglu": False}, "--swiglu True there, False here"),
    ("memory", {"variant": "pkm"}, "--memory-variant memory+ there, pkm here"),
    ("memory", {"num_half_keys": 16}, "--memory-num-half-keys 8 there, 16 here"),
    ("memory", {"layers": "0,1"}, "--memory-layers 1 there, 0,1 here"),
    ("memory", {"layers": None}, "--memory-layers 1 there, none here"),
    ("memory", {"share_scope": "layer"}, "--memory-share-scope model there, layer here"),
    ("memory", {"beside_mlp": True}, "--memory-beside-mlp False there, True here"),
    ("memory", {"qk_norm": True}, "--memory-qk-norm False there, True here"),
]


@pytest.mark.parametrize(("component", "fields", "expected"), ARCHITECTURES)
def test_another_architecture_is_named(component: str, fields: dict, expected: str, checkpoints):
    config, folder = checkpoints
    with pytest.raises(CheckpointError, match="another architecture") as caught:
        find_checkpoint(folder, change(config, component, **fields), VOCAB)
    assert expected in str(caught.value)


def test_every_difference_is_named_and_equal_spellings_are_none(checkpoints):
    config, folder = checkpoints
    other = change(change(config, "memory", layers="0,1", num_heads=4), "model", num_layers=4)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(folder, other, VOCAB)
    for flag in ("--num-layers", "--memory-layers", "--memory-num-heads"):
        assert flag in str(caught.value)
    # Of 2 layers, layer 0 or 1 is the middle one: two spellings of the same model.
    assert find_checkpoint(folder, change(config, "memory", layers="01"), VOCAB) is not None


def test_same_tensors_with_another_computation_are_told(checkpoints):
    config, folder = checkpoints
    other = change(change(config, "memory", top_k=2), "model", rotary_base=500000)
    notes = find_checkpoint(folder, other, VOCAB).notes
    assert notes == [
        "--rotary-base 10000 there, 500000 here",
        "--memory-top-k 4 there, 2 here",
    ]


def test_another_vocabulary(checkpoints):
    config, folder = checkpoints
    for vocab_size in (VOCAB - 1, VOCAB + 1):
        with pytest.raises(CheckpointError, match=f"64 tokens.* has {vocab_size}.*64 to 64"):
            find_checkpoint(folder, config, vocab_size)


def test_unreadable_configuration(checkpoints):
    config, folder = checkpoints
    (folder / "iter_0000004" / "config.yaml").write_text("num_layers: many\n")
    with pytest.raises(CheckpointError, match="config.yaml"):
        find_checkpoint(folder, config, VOCAB)
    save_config(config, folder / "iter_0000004" / "config.yaml")
    assert find_checkpoint(folder, config, VOCAB) is not None


class _Harm:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_code_in_a_checkpoint_is_not_run(name: str, checkpoints, tmp_path: Path):
    config, folder = checkpoints
    harm = tmp_path / "harm"
    path = folder / "iter_0000004" / name
    if name == "common.pt":
        torch.save({"iteration": _Harm(harm)}, path)
    else:
        path.write_bytes(pickle.dumps(_Harm(harm)))
    with pytest.raises(CheckpointError, match="is damaged"):
        find_checkpoint(folder, config, VOCAB)
    assert not harm.exists()


def test_getattr_in_metadata_is_refused(checkpoints):
    _, folder = checkpoints
    path = folder / "iter_0000004" / ".metadata"
    path.write_bytes(b"cbuiltins\ngetattr\n(ctorch\nSize\nV__subclasses__\ntR.")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_metadata(folder / "iter_0000004")


def test_file_outside_the_checkpoint_is_refused(checkpoints):
    _, folder = checkpoints
    inner = folder / "iter_0000004"
    metadata = read_metadata(inner)
    for stored in metadata.storage_data.values():
        stored.relative_path = "../iter_0000002/" + stored.relative_path
    with open(inner / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(CheckpointError, match="outside"):
        check_whole(inner)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("iteration", 2, "is of iteration 2, and its folder is named after iteration 4"),
        ("iteration", -4, "iteration is -4, and must be a whole number, 0 or more"),
        ("iteration", 4.0, "iteration is 4.0"),
        ("iteration", True, "iteration is True"),
        ("iteration", "4", "iteration is '4'"),
        ("iteration", [4], "iteration is a list"),
        ("consumed_samples", -1, "consumed_samples is -1"),
        ("consumed_samples", 2**63, f"consumed_samples is {2**63}"),
        ("vocab_size", 0, "vocab_size is 0, and must be a whole number above 0"),
        ("optimizer_step", -1, "optimizer_step is -1"),
        ("usage_since_sample", -1, "usage_since_sample is -1"),
        ("layout", {"data": -1}, "layout is a dict"),
        ("layout", [1], "layout is a list"),
        ("has_generators", 1, "has_generators is 1"),
        ("device", None, "device is None"),
    ],
)
def test_values_that_no_training_wrote(name: str, value: object, expected: str, checkpoints):
    _, folder = checkpoints
    inner = folder / "iter_0000004"
    common = read_common(inner)
    torch.save(common | {name: value}, inner / "common.pt")
    with pytest.raises(CheckpointError) as caught:
        read_common(inner)
    assert str(caught.value).startswith(f"{inner / 'common.pt'} is damaged: ")
    assert expected in str(caught.value)


def test_a_renamed_folder_has_no_position_to_contradict(checkpoints):
    _, folder = checkpoints
    (folder / "iter_0000004").rename(folder / "best")
    assert read_common(folder / "best")["iteration"] == 4
    (folder / "best").rename(folder / "iter_0000006")
    with pytest.raises(CheckpointError, match="is of iteration 4, and its folder is named after"):
        read_common(folder / "iter_0000006")


@pytest.mark.parametrize("text", ["9" * 5000, "-4", "4.0", "", "\ud5ff4", "four"])
def test_trackers_that_are_none(text: str, checkpoints):
    config, folder = checkpoints
    (folder / "latest_checkpointed_iteration.txt").write_text(text)
    with pytest.raises(CheckpointError, match="Write the iteration of a complete checkpoint .* 4"):
        find_checkpoint(folder, config, VOCAB)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (torch.zeros(64, 33), "is not the"),
        (torch.zeros(64, 32, dtype=torch.float64), "is not the"),
        ([1, 2], "is not the"),
        ("x" * 8192, "is not the"),
    ],
)
def test_another_tensor_in_its_place(stored: object, expected: str, checkpoints):
    """As where parts of two checkpoints are mixed up."""
    _, folder = checkpoints
    inner = folder / "iter_0000004"
    metadata = read_metadata(inner)
    key = "memory.shared.values.weight"
    ((index, place),) = [(i, p) for i, p in metadata.storage_data.items() if i.fqn == key]
    stream = io.BytesIO()
    torch.save(stored, stream)
    (inner / "another").write_bytes(stream.getvalue())
    metadata.storage_data[index] = _StorageInfo("another", 0, len(stream.getvalue()))
    reader = _CheckedReader(inner, metadata)
    with (
        open(inner / "another", "rb") as file,
        pytest.raises(CheckpointError, match=f"part of {key} at .0, 0. {expected}"),
    ):
        reader._slice_file(file, metadata.storage_data[index])
    with open(inner / place.relative_path, "rb") as file:
        _CheckedReader(inner, read_metadata(inner))._slice_file(file, place)


def test_fuzzed_metadata_raises_nothing_else(checkpoints):
    _, folder = checkpoints
    path = folder / "iter_0000004" / ".metadata"
    original = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(300):
        mutated = bytearray(original)
        for position in torch.randint(0, len(original), (3,), generator=generator).tolist():
            mutated[position] = int(torch.randint(0, 256, (), generator=generator))
        path.write_bytes(mutated)
        try:
            check_whole(folder / "iter_0000004")
        except CheckpointError:
            refused += 1
    assert refused > 30
