"""No file from outside a folder comes into what is made of it."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_memory.conversion.convert import convert, read_checkpoint
from megatron_memory.conversion.hf import read_hf
from megatron_memory.conversion.tokenizer_files import copy_tokenizer
from megatron_memory.exceptions import CheckpointError
from tests.conversion.states import conversion, golden_checkpoint, save_hf_model
from tests.conversion.tokenizers_of_many_kinds import EXAMPLE

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    save_hf_model("llama", folder)
    for file in EXAMPLE.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _link(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.rename(target)
    path.symlink_to(os.path.relpath(target, path.parent))


@pytest.mark.parametrize("name", FILES)
def test_a_link_that_leaves_the_folder_is_refused(name, model, tmp_path):
    _link(model / name, tmp_path / "elsewhere" / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*elsewhere.*cp -L"):
        read_hf(model)


def test_a_tokenizer_is_not_copied_through_such_a_link(model, tmp_path):
    _link(model / "tokenizer.json", tmp_path / "elsewhere" / "tokenizer.json")
    with pytest.raises(CheckpointError, match="is a link to"):
        copy_tokenizer(model, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_links_within_the_folder_and_to_the_folder_are_followed(model, tmp_path):
    for name in FILES:
        _link(model / name, model / "files" / name)
    (tmp_path / "link").symlink_to(model)
    assert len(read_hf(tmp_path / "link").weights) == len(read_hf(model).weights) > 0


def test_the_hubs_cache_is_read(model, tmp_path):
    """snapshots/REVISION/file -> ../../blobs/HASH, of the same repository alone."""
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    for name in FILES:
        _link(snapshot / name, repository / "blobs" / f"{name}-hash")
    state = read_hf(snapshot)
    assert state.tokenizer == snapshot
    copy_tokenizer(snapshot, tmp_path / "out")
    copied = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert copied == (EXAMPLE / "tokenizer.json").read_bytes()

    other = tmp_path / "hub" / "models--owner--other" / "blobs" / "hash"
    (snapshot / "config.json").unlink()
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "config.json").symlink_to(other)
    with pytest.raises(CheckpointError, match="models--owner--other"):
        read_hf(snapshot)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model in the two other formats."""
    folder = tmp_path_factory.mktemp("written")
    shutil.copytree(golden_checkpoint("peer"), folder / "lingua" / "0000000024")
    one = conversion("lingua", folder / "lingua", "megatron", folder / "megatron", verify=False)
    convert(one, lambda line: None)
    return {"lingua": folder / "lingua", "megatron": folder / "megatron"}


def _checkpoint(load: Path, kind: str) -> Path:
    return load / ("0000000024" if kind == "lingua" else "iter_0000024")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("lingua", name) for name in ("__0_0.distcp", ".metadata", "params.json")),
        *(("megatron", name) for name in ("__0_0.distcp", "common.pt", "config.yaml")),
    ],
)
def test_no_file_of_a_checkpoint_comes_from_outside(kind, name, written, tmp_path):
    """Not even one that has the checkpoint's own sum: three formats, one rule."""
    load = Path(shutil.copytree(written[kind], tmp_path / "load"))
    folder = _checkpoint(load, kind)
    expected = len(read_checkpoint(kind, load).weights)
    _link(folder / name, tmp_path / "elsewhere" / name)
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*elsewhere.*cp -L"):
        read_checkpoint(kind, load)
    # The fix that it names.
    (folder / name).unlink()
    shutil.copyfile(tmp_path / "elsewhere" / name, folder / name)
    assert len(read_checkpoint(kind, load).weights) == expected > 0


@pytest.mark.parametrize("kind", ["lingua", "megatron"])
def test_a_checkpoints_folder_that_is_elsewhere_is_named(kind, written, tmp_path):
    (tmp_path / "load").mkdir()
    folder = _checkpoint(tmp_path / "load", kind)
    real = _checkpoint(written[kind], kind)
    folder.symlink_to(real)
    with pytest.raises(CheckpointError, match=f"{folder} is a link to {real}, outside of .*load"):
        read_checkpoint(kind, tmp_path / "load")
    # A link that the user gives is what the user means.
    assert read_checkpoint(kind, folder).weights
