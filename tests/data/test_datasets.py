"""Samples: Megatron's, in its order, from a cache that each node builds once."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from tokenizers import Tokenizer

from megatron_memory.data import cached_datasets
from megatron_memory.data.datasets import build_datasets
from megatron_memory.data.loader import batch_iterator
from megatron_memory.data.tokenizers import build_tokenizer
from megatron_memory.exceptions import ConfigurationError, DataError
from tests.data.helpers import GOLDEN, NUM_IDS, null_tokenizer, random_documents, write_dataset
from tests.distributed import run_ranks
from tests.hostile import mutated

SEQ_LENGTH = 16


def build(cache: Path | None = None, num_samples=(40, 6, 4), **options):
    defaults = dict(
        tokenizer=null_tokenizer(),
        padded_vocab_size=NUM_IDS + 1,
        seq_length=SEQ_LENGTH,
        seed=7,
        data_cache_path=None if cache is None else str(cache),
    )
    counts = dict(
        zip(
            ("num_train_samples", "num_valid_samples", "num_test_samples"), num_samples, strict=True
        )
    )
    return build_datasets(**{**defaults, **counts, **options})


def megatrons_own(num_samples=(40, 6, 4), **blend):
    """The same datasets from megatron-core alone."""
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=SEQ_LENGTH,
        tokenizer=null_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache="",
        **blend,
    )
    return BlendedMegatronDatasetBuilder(
        GPTDataset, list(num_samples), lambda: True, config
    ).build()


@pytest.fixture
def pair(tmp_path):
    return write_dataset(tmp_path / "first", random_documents(100))


@pytest.fixture
def other(tmp_path):
    return write_dataset(tmp_path / "other", random_documents(60, seed=1))


def assert_same(ours, theirs) -> None:
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        a, b = ours[i], theirs[i]
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert np.array_equal(a[key], value), f"sample {i}, {key}"


SPECIAL = {
    "pad": {"pad_token": "<|reserved_0|>"},
    "pad is eos": {"pad_token": "<|endoftext|>"},
    "pad is bos": {"pad_token": "<|reserved_0|>", "bos_token": "<|reserved_0|>"},
    "pad is unk": {"pad_token": "<|reserved_0|>", "unk_token": "<|reserved_0|>"},
    "pad is a word": {"pad_token": "the"},
    "no pad": {"bos_token": "<|reserved_0|>", "unk_token": "<|reserved_1|>", "mask_token": "is"},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_every_id_of_the_corpus_is_seen_as_it_is(tmp_path, name):
    """Whatever the tokenizer calls its special tokens, and with each mask that a flag asks for."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(GOLDEN / "tokenizer", folder)
    definition = Tokenizer.from_file(str(folder / "tokenizer.json"))
    definition.add_special_tokens(["<|reserved_0|>", "<|reserved_1|>"])
    definition.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SPECIAL[name]))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
    text = "the cat<|reserved_0|> is the<|reserved_1|> cat<|endoftext|> on the mat"
    ids = definition.encode(text, add_special_tokens=False).ids
    documents = [np.roll(ids, i).tolist() + [tokenizer.eod] for i in range(40)]
    pair = write_dataset(tmp_path / "special", documents)
    options = {
        "tokenizer": tokenizer,
        "padded_vocab_size": 2**14,
        "data_path": [pair],
        "split": "1",
    }
    counts = (2 * len(documents), 0, 0)
    stream = np.concatenate(documents)
    for mask in (False, True):
        data = build(tmp_path / f"cache{mask}", counts, eod_mask_loss=mask, **options).train
        plain = megatrons_own(counts, blend=([pair], None), split="1")[0]
        seen = set()
        for ours, theirs in ((data[i], plain[i]) for i in range(len(data))):
            assert torch.equal(ours["tokens"], theirs["tokens"])
            assert torch.equal(ours["labels"], theirs["labels"])
            wanted = (ours["tokens"] != tokenizer.eod) if mask else torch.ones(SEQ_LENGTH)
            assert torch.equal(ours["loss_mask"], wanted.float())
            seen |= set(ours["tokens"].tolist())
        assert seen == set(stream.tolist())


def test_one_dataset(tmp_path, pair):
    data = build(tmp_path / "cache", data_path=[pair], split="80,15,5")
    theirs = megatrons_own(blend=([pair], None), split="80,15,5")
    for ours, expected in zip((data.train, data.valid, data.test), theirs, strict=True):
        assert_same(ours, expected)
    sample = data.train[0]
    assert sample["tokens"].shape == (SEQ_LENGTH,)
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert "attention_mask" not in sample
    assert data.summary[0].startswith(f"{pair}: 100 documents")
    assert data.summary[1].startswith("training: 40 samples, ")


@pytest.mark.parametrize("weights", [None, [0.3, 0.7]])
def test_two_datasets(tmp_path, pair, other, weights):
    mixed = [pair, other] if weights is None else ["0.3", pair, "0.7", other]
    theirs = megatrons_own(blend=([pair, other], weights), split="80,15,5")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        data = build(cache, data_path=mixed, split="80,15,5")
        for ours, expected in zip((data.train, data.valid, data.test), theirs, strict=True):
            assert_same(ours, expected)


def test_datasets_of_their_own_for_each_split(tmp_path, pair, other):
    paths = dict(train_data_path=["1", pair, "2", other], valid_data_path=[other])
    data = build(tmp_path / "cache", num_samples=(40, 6, 0), **paths)
    theirs = megatrons_own(
        (40, 6, 0), blend_per_split=[([pair, other], [1.0, 2.0]), ([other], None), None]
    )
    assert_same(data.train, theirs[0])
    assert_same(data.valid, theirs[1])
    assert data.test is None


def test_data_is_repeated_where_more_is_asked_for(tmp_path, pair):
    data = build(tmp_path / "cache", (1000, 0, 0), data_path=[pair], split="1")
    assert_same(data.train, megatrons_own((1000, 0, 0), blend=([pair], None), split="1")[0])
    assert "passes" in data.summary[1]


def test_splits_without_a_share_or_a_need_are_none(tmp_path, pair):
    data = build(tmp_path / "cache", data_path=[pair], split="1")
    assert data.train is not None and data.valid is None and data.test is None
    assert data.summary[2:] == ("validation: no data", "test: no data")
    # The test part has no document, but no sample of it is needed either.
    data = build(tmp_path / "cache", (40, 6, 0), data_path=[pair], split="9000,999,1")
    assert data.valid is not None and data.test is None


def test_the_cache_is_read_the_second_time(tmp_path, pair, monkeypatch):
    first = build(tmp_path / "cache", data_path=[pair], split="80,15,5")
    monkeypatch.setattr(cached_datasets, "_save", lambda *_: pytest.fail("built again"))
    assert_same(build(tmp_path / "cache", data_path=[pair], split="80,15,5").train, first.train)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_without_a_cache_path_the_cache_lies_beside_the_data(tmp_path, pair):
    build(data_path=[pair], split="1")
    assert len(list((tmp_path / "first/cache/GPTDataset_indices").glob("*.npy"))) == 3


def test_data_made_again_gets_a_new_index(tmp_path, pair):
    build(tmp_path / "cache", data_path=[pair], split="1")
    write_dataset(tmp_path / "first", random_documents(100, seed=5))
    data = build(tmp_path / "cache", data_path=[pair], split="1")
    assert_same(data.train, megatrons_own(blend=([pair], None), split="1")[0])


def test_a_damaged_cache_is_named(tmp_path, pair):
    build(tmp_path / "cache", data_path=[pair], split="1")
    path = next((tmp_path / "cache").glob("*-shuffle_index.npy"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=f"{path}: a damaged file of the index cache.*Delete it"):
        build(tmp_path / "cache", data_path=[pair], split="1")


def test_no_damage_to_the_cache_is_silent(tmp_path, pair):
    build(tmp_path / "cache", data_path=[pair], split="1")
    choose, silent = random.Random(4), []
    for path in sorted((tmp_path / "cache").glob("*.npy")):
        content, sound = path.read_bytes(), cached_datasets._load(str(path)).copy()
        for _ in range(60):
            path.unlink()
            path.write_bytes(mutated(content, choose))
            try:
                found = cached_datasets._load(str(path))
            except DataError as error:
                assert str(path) in str(error)
                continue
            if not np.array_equal(found, sound):
                silent.append(path)
    assert not silent


def test_a_cache_of_an_earlier_version_has_no_checksums(tmp_path, pair):
    first = build(tmp_path / "cache", data_path=[pair], split="80,15,5")
    for path in (tmp_path / "cache").glob("*.crc32"):
        path.unlink()
    assert_same(build(tmp_path / "cache", data_path=[pair], split="80,15,5").train, first.train)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, pair):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"{tmp_path}/file/cache: .*--data-cache-path DIR"):
        build(tmp_path / "file/cache", data_path=[pair], split="1")


def test_a_token_id_beyond_the_vocabulary(tmp_path, pair):
    data = build(tmp_path / "cache", data_path=[pair], split="1", padded_vocab_size=990)
    batches = batch_iterator(
        data.train,
        consumed_samples=0,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=0,
    )
    with pytest.raises(DataError, match=f"{pair}.bin: .* the model has 990 entries.*--vocab-size"):
        list(batches)


def test_a_negative_token_id(tmp_path):
    prefix = write_dataset(tmp_path / "data", [[5, -3, 7] * 20], dtype=np.int32)
    data = build(tmp_path / "cache", (2, 0, 0), data_path=[prefix], split="1")
    with pytest.raises(DataError, match="token ids from -3 to 7"):
        data.train[0]


@pytest.mark.parametrize(
    ("num_samples", "flags", "message"),
    [
        (
            (40, 6, 4),
            {"split": "9000,999,1"},
            r"test part \(0 of 100 documents\) holds 0 tokens, which give 0 samples of "
            "--seq-length 16, but 4 samples are needed",
        ),
        ((40, 6, 4), {"split": "0,1,1"}, "--split 0,1,1: gives training nothing, but 40 samples"),
        (
            (2, 0, 0),
            {"split": "1", "seq_length": 10**6},
            r"it holds \d+ tokens, which give 0 samples of --seq-length 1000000, but 2",
        ),
    ],
)
def test_too_few_samples(tmp_path, pair, num_samples, flags, message):
    with pytest.raises(DataError, match=message):
        build(tmp_path / "cache", num_samples, data_path=[pair], **flags)


def test_too_few_samples_in_several_datasets(tmp_path, pair, other):
    message = (
        r"training split gives \d+ samples, but 5000 are needed, .* read only once. Give weights "
        rf"\(--data-path \d+ {pair} \d+ {other}\)"
    )
    with pytest.raises(DataError, match=message):
        build(tmp_path / "cache", (5000, 0, 0), data_path=[pair, other], split="1")


def test_a_missing_dataset(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/absent.idx: cannot be read"):
        build(tmp_path / "cache", data_path=[f"{tmp_path}/absent"], split="1")


def test_resets_at_the_end_of_a_document(tmp_path):
    prefix = write_dataset(tmp_path / "data", [[1, 2, NUM_IDS, 3, 4, 5, NUM_IDS, 6] * 4])
    data = build(
        tmp_path / "cache",
        (1, 0, 0),
        data_path=[prefix],
        split="1",
        seq_length=8,
        reset_position_ids=True,
        reset_attention_mask=True,
        eod_mask_loss=True,
    )
    sample = data.train[0]
    ends = (sample["tokens"] == NUM_IDS).nonzero().flatten().tolist()
    assert ends, "the sample must hold ends of documents"
    assert sample["loss_mask"].tolist() == [0.0 if i in ends else 1.0 for i in range(8)]
    starts = [0, *(end + 1 for end in ends)]
    first_of_own = [max(start for start in starts if start <= i) for i in range(8)]
    assert sample["position_ids"].tolist() == [i - first_of_own[i] for i in range(8)]
    allowed = [[first_of_own[i] <= j <= i for j in range(8)] for i in range(8)]
    assert (~sample["attention_mask"][0]).tolist() == allowed
    batch = next(
        batch_iterator(
            data.train,
            consumed_samples=0,
            micro_batch_size=1,
            data_parallel_rank=0,
            data_parallel_size=1,
            num_workers=0,
        )
    )
    assert batch["attention_mask"].shape == (1, 1, 8, 8)


def test_resets_need_an_end_of_document(tmp_path, pair):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(GOLDEN / "tokenizer"))
    tokenizer._tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token, which .* --eod-mask-loss need"):
        build(data_path=[pair], split="1", tokenizer=tokenizer, eod_mask_loss=True)


def test_flags_are_checked_before_files():
    with pytest.raises(ConfigurationError, match="no training data"):
        build()


def _build_on_nodes(folder: str, pairs: list[str], ranks_per_node: int, shared_disk: bool):
    """Each node has its own cache folder, unless the disk is shared."""
    rank = torch.distributed.get_rank()
    os.environ["LOCAL_RANK"] = str(rank % ranks_per_node)
    node = 0 if shared_disk else rank // ranks_per_node
    written = []
    save = cached_datasets._save
    cached_datasets._save = lambda path, array: (written.append(path), save(path, array))
    data = build(
        Path(folder) / f"cache{node}",
        data_path=["0.3", pairs[0], "0.7", pairs[1]],
        split="80,15,5",
    )
    tokens = torch.stack([data.train[i]["tokens"] for i in range(len(data.train))])
    return len(written), len(data.summary), tokens


@pytest.mark.distributed
@pytest.mark.parametrize(("shared_disk", "writers"), [(True, [0]), (False, [0, 2])])
def test_each_node_builds_its_cache_once(tmp_path, pair, other, shared_disk, writers):
    results = run_ranks(_build_on_nodes, 4, str(tmp_path), [pair, other], 2, shared_disk)
    assert [rank for rank, (written, _, _) in enumerate(results) if written] == writers
    assert [bool(summary) for _, summary, _ in results] == [True, False, True, False]
    for _, _, tokens in results:
        assert torch.equal(tokens, results[0][2])


def _build_where_one_node_lacks_its_data(folder: str, prefix: str):
    rank = torch.distributed.get_rank()
    os.environ["LOCAL_RANK"] = "0"
    path = f"{folder}/absent" if rank == 2 else prefix
    try:
        build(Path(folder) / "cache", data_path=[path], split="1")
    except DataError as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
def test_a_failure_on_one_node_is_raised_on_every_rank(tmp_path, pair):
    messages = run_ranks(_build_where_one_node_lacks_its_data, 3, str(tmp_path), pair)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"{tmp_path}/absent.idx: cannot be read")
