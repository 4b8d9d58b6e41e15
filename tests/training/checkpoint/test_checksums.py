"""Checksums: what is written, what is refused, and who reads what."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_memory.config import Config
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint import checksums, checksums_together, finding, folders
from megatron_memory.training.checkpoint.checksums import (
    SUMS_FILE,
    Sums,
    check_sums,
    decode,
    encode,
    write_sums,
)
from megatron_memory.training.checkpoint.checksums_together import shares
from tests.distributed import run_ranks
from tests.lines import COMMON_FILES
from tests.training.checkpoint.damages import KINDS
from tests.training.tiny_runs import VOCAB, change, runs, tiny_config

MARKED = {"checksums": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chance = random.Random(2)
    root = tmp_path / "iter_0000001"
    root.mkdir()
    for name, size in (("a.distcp", 5000), ("b.distcp", 300), (".metadata", 80), ("empty", 0)):
        (root / name).write_bytes(chance.randbytes(size))
    return root


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_named(kind: str, algorithm: str, folder: Path):
    write_sums(folder, algorithm)
    assert check_sums(folder, MARKED)
    for name in ("a.distcp", ".metadata", SUMS_FILE):
        damaged = folder.parent / name / folder.name
        shutil.copytree(folder, damaged)
        KINDS[kind](damaged, damaged / name, random.Random(5))
        with pytest.raises(CheckpointError) as caught:
            check_sums(damaged, MARKED)
        assert str(damaged) in str(caught.value)
        if kind in ("flip", "truncate", "append", "move", "delete") and name != SUMS_FILE:
            assert str(damaged / name) in str(caught.value)


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_every_bit_of_the_sums_themselves_counts(algorithm: str, folder: Path):
    write_sums(folder, algorithm)
    path = folder / SUMS_FILE
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 5):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(CheckpointError):
                check_sums(folder, MARKED)


def test_blocks_of_one_file_and_what_megatron_core_writes(folder: Path, monkeypatch):
    how = checksums.ALGORITHMS["xxh3_128"]
    small = {"xxh3_128": checksums.dataclasses.replace(how, block_size=64)}
    monkeypatch.setattr(checksums, "ALGORITHMS", checksums.ALGORITHMS | small)
    write_sums(folder, "xxh3_128")
    sums = decode((folder / SUMS_FILE).read_bytes())
    places = checksums.all_places(folder, sums)
    assert sum(places.values()) == 5380 and places["a.distcp", 78] == 5000 - 78 * 64
    parts = shares(places, 3)
    loads = [sum(places[place] for place in part) for part in parts]
    assert sorted(p for part in parts for p in part) == sorted(places)
    assert max(loads) - min(loads) <= 64
    assert check_sums(folder, MARKED)
    content = bytearray((folder / "a.distcp").read_bytes())
    content[0:64], content[64:128] = content[64:128], content[0:64]
    (folder / "a.distcp").write_bytes(content)
    with pytest.raises(CheckpointError, match="a.distcp is damaged"):
        check_sums(folder, MARKED)


def test_sums_that_megatron_core_wrote(folder: Path):
    """Its manifest has the algorithm and the files alone."""
    write_sums(folder, "sha256")
    written = json.loads((folder / SUMS_FILE).read_bytes())
    theirs = {"algorithm": written["algorithm"], "files": written["files"]}
    (folder / SUMS_FILE).write_text(json.dumps(theirs, indent=2))
    assert check_sums(folder, {})
    KINDS["flip"](folder, folder / "b.distcp", random.Random(1))
    with pytest.raises(CheckpointError, match="b.distcp is damaged"):
        check_sums(folder, {})


def test_folders_without_sums(folder: Path):
    assert check_sums(folder, {}) is False
    with pytest.raises(CheckpointError, match="integrity.json is missing: the checkpoint was"):
        check_sums(folder, MARKED)
    write_sums(folder, "xxh3_128")
    (folder / ".nfs0000000012ab").touch()
    assert check_sums(folder, MARKED)


def test_links_count_as_what_they_lead_to(folder: Path):
    """Storage that keeps files elsewhere links to them; a pipe would be waited for."""
    write_sums(folder, "xxh3_128")
    elsewhere = folder.parent / "elsewhere"
    (folder / "a.distcp").rename(elsewhere)
    (folder / "a.distcp").symlink_to(elsewhere)
    assert check_sums(folder, MARKED)
    KINDS["flip"](folder, elsewhere, random.Random(1))
    with pytest.raises(CheckpointError, match="a.distcp is damaged"):
        check_sums(folder, MARKED)
    (folder / "a.distcp").unlink()
    os.mkfifo(folder / "a.distcp")
    with pytest.raises(CheckpointError, match="a.distcp is missing"):
        check_sums(folder, MARKED)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b'{"algorithm": "md5", "files": {}}',
        b'{"algorithm": ["sha256"], "files": {}}',
        b'{"algorithm": "sha256", "files": {"a.distcp": 1}}',
        b'{"algorithm": "sha256", "files": 3}',
        # Ours have a sum of themselves.
        b'{"algorithm": "xxh3_128", "files": {}}',
        b'{"algorithm": "sha256", "files": {"../../etc/passwd": "00"}}',
        encode(Sums(algorithm="xxh3_128", files={"a.distcp": "0"}, sizes={"a.distcp": -1})),
    ],
)
def test_sums_that_are_nonsense(content: bytes, folder: Path):
    (folder / SUMS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged|not of this checkpoint"):
        check_sums(folder, MARKED)


def _load(config: Config, folder: str) -> tuple[str | None, list[str], dict[str, int]]:
    """What a rank hears of a checkpoint, and the bytes of each file that it has summed."""
    read: Counter[str] = Counter()
    sum_places = checksums_together.sum_places

    def counting(root, places, *rest):
        blocks = {name: (root / name).stat().st_size for name, _ in places}
        read.update(blocks)
        return sum_places(root, places, *rest)

    checksums_together.sum_places = counting
    said: list[str] = []
    problem = None
    config = change(config, "checkpoint", load=folder)
    try:
        found = finding.find_start(config, VOCAB, said.append)
        with finding.comparing_content(found, config.checkpoint.checksums, said.append):
            pass
    except CheckpointError as error:
        problem = str(error)
    finally:
        checksums_together.sum_places = sum_places
    return problem, said, dict(read)


def _save_damage_and_load(config: Config, root: str) -> dict[str, list]:
    runs([change(config, "training", train_iters=4)])
    newest, chance = Path(root) / "iter_0000004", random.Random(9)
    heard = {"whole": _load(config, root)}
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            KINDS["flip"](newest, path, chance)
        torch.distributed.barrier()
        heard[path.name] = _load(config, root)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            path.write_bytes(content)
        torch.distributed.barrier()
    heard["not compared"] = _load(change(config, "checkpoint", checksums="none"), root)
    sums = (newest / SUMS_FILE).read_bytes()
    torch.distributed.barrier()
    (newest / SUMS_FILE).unlink(missing_ok=True)
    torch.distributed.barrier()
    heard["removed"] = _load(config, root)
    torch.distributed.barrier()
    (newest / SUMS_FILE).write_bytes(sums)
    torch.distributed.barrier()
    old = change(config, "checkpoint", save=f"{root}/old", checksums="none")
    runs([change(old, "training", train_iters=2)])
    heard["old"] = _load(config, f"{root}/old/iter_0000002")
    return heard


@pytest.mark.distributed
@pytest.mark.parametrize("async_save", [False, True])
def test_a_flip_in_each_file_is_named_on_all_ranks(async_save: bool, dataset: str, tmp_path: Path):
    config = tiny_config(
        dataset,
        checkpoint={"save": str(tmp_path), "save_interval": 2, "async_save": async_save},
    )
    ranks = run_ranks(_save_damage_and_load, 2, config, str(tmp_path))
    newest = tmp_path / "iter_0000004"
    files = {path.name for path in newest.iterdir()}
    assert {*COMMON_FILES, ".metadata", "config.yaml", "metadata.json", SUMS_FILE} < files
    assert not any("integrity_of_rank" in name for name in files)
    for heard in ranks:
        assert heard["whole"][:2] == (None, [])
        for name in files:
            problem = heard[name][0]
            assert problem == ranks[0][name][0]
            assert str(newest / name) in problem, (name, problem)
            assert f"Complete is iteration 2: --load {tmp_path / 'iter_0000002'}" in problem
        assert "none" in heard["not compared"][1][0] and heard["not compared"][0] is None
        assert f"{newest / SUMS_FILE} is missing" in heard["removed"][0]
        assert "was written without checksums" in heard["old"][1][0]
    # Each rank reads its share, about as many bytes as the other.
    shares_read = [heard["whole"][2] for heard in ranks]
    assert shares_read[0].keys() | shares_read[1].keys() == files - {SUMS_FILE}
    assert not shares_read[0].keys() & shares_read[1].keys()
    sizes = [sum(share.values()) for share in shares_read]
    assert max(sizes) < 1.6 * min(sizes)


def test_writers_sum_what_they_write(dataset: str, tmp_path: Path, monkeypatch):
    """Rank 0 reads the small files alone, so that publishing costs the same for any model."""
    config = tiny_config(dataset, checkpoint={"save": str(tmp_path), "save_interval": 1})
    (summed,) = run_ranks(_names_summed_at_publishing, 1, change(config, "training", train_iters=1))
    assert summed == {".metadata", *COMMON_FILES, "config.yaml", "metadata.json"}
    assert folders.read_tracker(tmp_path) == 1


def _names_summed_at_publishing(config: Config) -> set[str]:
    seen: set[str] = set()
    sum_files = checksums.sum_files

    def recording(folder, names, algorithm):
        names = list(names)
        seen.update(names)
        return sum_files(folder, names, algorithm)

    checksums.sum_files = recording
    try:
        runs([config])
    finally:
        checksums.sum_files = sum_files
    return seen
