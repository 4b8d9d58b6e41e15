"""A folder is only read, and only one model comes out of it."""

import os
import shutil
from pathlib import Path

import pytest

from megatron_memory.conversion import convert as convert_module
from megatron_memory.conversion.convert import convert
from megatron_memory.conversion.unchanged import Unchanged
from megatron_memory.exceptions import CheckpointError
from tests.conversion.states import conversion, golden_checkpoint, save_hf_model


def test_a_folder_inside_of_the_one_that_is_read_is_refused(tmp_path: Path):
    save_hf_model("qwen3", tmp_path / "in")
    files = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for save in ("in/out", "in/../in/a/b", "link/out"):
        with pytest.raises(CheckpointError, match="lies in --load .*Name a folder outside"):
            convert(conversion("hf", tmp_path / "in", "megatron", tmp_path / save), print)
    assert sorted(tmp_path.rglob("*")) == [*files, tmp_path / "link"]


@pytest.mark.parametrize(
    ("source", "file"), [("hf", "model.safetensors"), ("lingua", "params.json")]
)
def test_what_is_written_to_meanwhile_is_refused(source, file, tmp_path: Path, monkeypatch):
    """Before anything has the name: the tensors that were read may be of two models."""
    if source == "hf":
        save_hf_model("qwen3", tmp_path / "in")
    else:
        shutil.copytree(golden_checkpoint("peer"), tmp_path / "in" / "0000000024")
    write = convert_module._write

    def written_to_meanwhile(*args):
        notes = write(*args)
        path = next((tmp_path / "in").rglob(file))
        os.utime(path, ns=(1, 1))
        (path.parent / "new").touch()
        return notes

    monkeypatch.setattr(convert_module, "_write", written_to_meanwhile)
    with pytest.raises(CheckpointError, match=f"{file}: changed or removed while"):
        convert(conversion(source, tmp_path / "in", "megatron", tmp_path / "out"), print)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_changes_that_are_seen(tmp_path: Path):
    for name in "abc":
        (tmp_path / name).write_text("1")
    watched = Unchanged(tmp_path)
    (tmp_path / "later").touch()
    watched.check()
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("22")
    (tmp_path / "new").write_text("1")
    os.replace(tmp_path / "new", tmp_path / "c")
    with pytest.raises(CheckpointError) as raised:
        watched.check()
    assert all(f"{tmp_path / name}" in str(raised.value) for name in "abc")
    Unchanged(None).check()
