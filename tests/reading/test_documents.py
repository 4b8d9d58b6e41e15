"""JSON and YAML within bounds."""

import os
import time
from pathlib import Path

import pytest

from megatron_memory.config import load_config
from megatron_memory.data.index_files import check_indexed_dataset
from megatron_memory.exceptions import CheckpointError, ConfigurationError, DataError
from megatron_memory.reading.documents import (
    parse_json,
    parse_yaml_pairs,
    read_bounded,
    read_json,
)
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import load_torch_file, load_torch_part
from megatron_memory.training.checkpoint.metadata_file import read_metadata
from tests.bounded import within
from tests.hostile import HOSTILE_JSON, HOSTILE_YAML

MIB = 1 << 20


def test_plain_documents():
    assert parse_json(b'{"a": [1, {"b": null}], "c": 1e3}') == {"a": [1, {"b": None}], "c": 1e3}
    text = b"a: 1\nb: [x, 2.5]\n'c': on\na: 2\n# comment\nd:\n  - 1\n"
    assert parse_yaml_pairs(text) == [
        ("a", 1),
        ("b", ["x", 2.5]),
        ("c", True),
        ("a", 2),
        ("d", [1]),
    ]
    assert parse_yaml_pairs(b"") == []


@pytest.mark.parametrize("name", HOSTILE_JSON)
def test_hostile_json_is_refused_by_name(name: str, tmp_path: Path):
    path = tmp_path / "hostile.json"
    path.write_bytes(HOSTILE_JSON[name])

    def read() -> None:
        with pytest.raises(CheckpointError) as caught:
            read_json(path, CheckpointError)
        reason = str(caught.value).removeprefix(f"{path}: cannot be read: ")
        assert 10 < len(reason) < 400 and "Error" not in reason

    begin = time.process_time()
    assert within(512 * MIB, read) < 64 * MIB + 100 * path.stat().st_size
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused_by_name(name: str, tmp_path: Path):
    path = tmp_path / "hostile.yaml"
    path.write_bytes(HOSTILE_YAML[name])

    def read() -> None:
        with pytest.raises(ConfigurationError) as caught:
            load_config(path)
        message = str(caught.value)
        # An empty set of settings lacks others as well.
        assert str(path) in message and len(message) < 2000, message

    begin = time.process_time()
    assert within(512 * MIB, read) < 64 * MIB
    assert time.process_time() - begin < 20


def test_only_files_are_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeFile, match="no regular file"):
        read_bounded(tmp_path / "pipe", 10)
    with pytest.raises(UnsafeFile, match="no regular file"):
        read_bounded("/dev/zero", 10)
    with pytest.raises(OSError, match="directory"):
        read_bounded(tmp_path, 10)
    (tmp_path / "long").write_bytes(bytes(11))
    with pytest.raises(UnsafeFile, match="more than 10 bytes"):
        read_bounded(tmp_path / "long", 10)
    assert read_bounded(tmp_path / "long", 11) == bytes(11)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_pipes_and_devices_are_refused_wherever_a_file_is_read(make, tmp_path: Path):
    """At once: a pipe that nobody writes to would be waited for, and a device has no end."""
    path = tmp_path / ".metadata"
    make(path)
    os.link(path, tmp_path / "tokens.idx", follow_symlinks=False)
    (tmp_path / "tokens.bin").write_bytes(b"")
    for read, expected in (
        (lambda: read_bounded(path, 100), UnsafeFile),
        (lambda: load_torch_file(path), UnsafeFile),
        (lambda: load_torch_part(path, 0, 100), UnsafeFile),
        (lambda: read_metadata(tmp_path), CheckpointError),
        (lambda: check_indexed_dataset(str(tmp_path / "tokens")), DataError),
    ):
        with pytest.raises(expected, match="no regular file"):
            read()
