"""Damage to `.bin`/`.idx` pairs is named, whatever the damage."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_memory.data import index_files
from megatron_memory.data.index_files import check_indexed_dataset, index_fingerprint
from megatron_memory.exceptions import DataError
from tests.data.helpers import GOLDEN, random_documents, write_dataset

HEADER_BYTES = 34


@pytest.fixture
def pair(tmp_path):
    documents = [*random_documents(20), []]
    return write_dataset(tmp_path / "data", documents)


def edit(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_a_sound_pair(pair):
    summary = check_indexed_dataset(pair)
    documents = random_documents(20)
    assert summary.num_documents == 21 and summary.num_sequences == 20
    assert summary.num_tokens == sum(map(len, documents))
    assert summary.sequence_lengths.tolist() == list(map(len, documents))
    assert summary.dtype == np.uint16
    assert str(summary) == f"{pair}: 21 documents, {summary.num_tokens:,} tokens (uint16)"


def test_what_megatron_lm_wrote():
    summary = check_indexed_dataset(str(GOLDEN / "mlm_text_document"))
    assert (summary.num_documents, summary.num_sequences) == (305, 304)
    assert summary.num_tokens == 25582 // 2


@pytest.mark.parametrize("chunk", [1, 3, 20, 21])
def test_pieces_of_a_long_index(pair, monkeypatch, chunk):
    monkeypatch.setattr(index_files, "_CHUNK", chunk)
    assert check_indexed_dataset(pair).num_sequences == 20
    pointers = HEADER_BYTES + 4 * 20
    edit(f"{pair}.idx", pointers + 8 * 7, struct.pack("<q", 10**6))
    with pytest.raises(DataError, match="sequence 7 points at byte 1000000"):
        check_indexed_dataset(pair)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file(tmp_path, pair, suffix):
    (tmp_path / f"data{suffix}").unlink()
    with pytest.raises(DataError, match=f"{pair}{suffix}: cannot be read .*preprocess_data.py"):
        check_indexed_dataset(pair)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_prefix_with_its_suffix(pair, suffix):
    with pytest.raises(DataError, match=f"Give the path without {suffix}: {pair}$"):
        check_indexed_dataset(pair + suffix)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"NOTANIDX!", "not the index of a dataset"),
        (9, struct.pack("<Q", 2), "format version 2, not 1"),
        (17, b"\x63", "unknown dtype code 99"),
        (17, b"\x07", "holds float32, but token ids are whole numbers"),
        (17, b"\x04", "sequence 1 points at byte"),
        (18, struct.pack("<Q", 2**63), "cut off"),
        (18, struct.pack("<Q", 19), "multimodal index is not text"),
        (HEADER_BYTES, struct.pack("<i", -5), "sequence 0 has a negative length"),
        (HEADER_BYTES + 4 * 20, struct.pack("<q", -8), "sequence 0 points at byte -8"),
        (HEADER_BYTES + 12 * 20, struct.pack("<q", 1), "document bounds go from 1 to 20"),
        (HEADER_BYTES + 12 * 20 + 8, struct.pack("<q", 50), "document bounds are out of order"),
        (HEADER_BYTES + 12 * 20 + 8 * 21, struct.pack("<q", 99), "document bounds go from 0 to 99"),
    ],
)
def test_a_damaged_index(pair, offset, content, message):
    edit(f"{pair}.idx", offset, content)
    with pytest.raises(DataError, match=f"{pair}.idx: .*{message}"):
        check_indexed_dataset(pair)


@pytest.mark.parametrize("num_bytes", [0, 5, 9, 33, 34, 100, -1])
def test_an_index_cut_off(tmp_path, pair, num_bytes):
    path = tmp_path / "data.idx"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=f"{path}: (cut off|not the index)"):
        check_indexed_dataset(pair)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tokens: tokens[:-2], "cut off: .* points at"),
        (lambda tokens: b"", "cut off: 0 bytes"),
        (lambda tokens: tokens + b"..", "do not belong together"),
    ],
)
def test_tokens_of_another_index(tmp_path, pair, change, message):
    path = tmp_path / "data.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"{path}: .*{message}"):
        check_indexed_dataset(pair)


def test_nothing_in_it(tmp_path):
    with pytest.raises(DataError, match="holds no sequences"):
        check_indexed_dataset(write_dataset(tmp_path / "empty", []))


def test_any_damage_is_found_or_harmless(tmp_path):
    """Whatever passes the check can be read from end to end."""
    documents = random_documents(12, shortest=1, longest=9)
    write_dataset(tmp_path / "data", documents)
    sound = {suffix: (tmp_path / f"data{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    choose = random.Random(0)
    refused = 0
    for number in range(2000):
        # New files each time: to write over one makes the file system bring it to the disk.
        prefix = str(tmp_path / str(number))
        mutated = choose.choice([".idx", ".idx", ".idx", ".bin"])
        for suffix, content in sound.items():
            content = _mutated(content, choose) if suffix == mutated else content
            Path(prefix + suffix).write_bytes(content)
        try:
            summary = check_indexed_dataset(prefix)
        except DataError as error:
            assert f"{prefix}." in str(error)
            refused += 1
            continue
        dataset = IndexedDataset(prefix)
        read = [dataset[i] for i in range(len(dataset))]
        assert sum(map(len, read)) == summary.num_tokens
        assert len(dataset.document_indices) == summary.num_documents + 1
    assert 1400 < refused < 2000, "the mutations must do both, damage and leave alone"


def _mutated(content: bytes, choose: random.Random) -> bytes:
    changed = bytearray(content)
    kind = choose.choice(["flip", "flip", "cut", "grow", "zero", "swap", "count"])
    place = choose.randrange(len(changed))
    if kind == "flip":
        changed[place] ^= 1 << choose.randrange(8)
    elif kind == "cut":
        del changed[place:]
    elif kind == "grow":
        changed[place:place] = choose.randbytes(choose.randrange(1, 40))
    elif kind == "count":
        # Sequences or document bounds: as many as make the sizes overflow, or memory run out.
        count = choose.choice([2**63, 2**61 - 1, 2**40, 2**32, 2**31 + 7, 1, 0])
        struct.pack_into("<Q", changed, choose.choice([18, 26]), count)
    elif kind == "zero":
        changed[place : place + 8] = bytes(len(changed[place : place + 8]))
    else:
        other = choose.randrange(len(changed))
        changed[place], changed[other] = changed[other], changed[place]
    return bytes(changed)


def test_the_fingerprint_follows_the_content(tmp_path, pair):
    before = index_fingerprint(pair)
    assert index_fingerprint(pair) == before
    edit(f"{pair}.bin", 3, b"\x55")
    assert index_fingerprint(pair) != before
