"""megatron-core's GPT and blended datasets with an index cache that every node can fill.

megatron-core builds the cache on rank 0 alone, so nodes without a shared disk never get theirs; it
writes the files in place, so that a crash leaves half of one; and its key ignores the data, so
that a dataset made again under its old name is read with the old index. Sample order is its own.
"""

import contextlib
import copy
import dataclasses
import hashlib
import logging
import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from megatron_memory.exceptions import DataError

Arrays = tuple[np.ndarray, ...]

_SUM = ".crc32"
_CHUNK = 1 << 20

_NO_TOKEN = -1
"""megatron-core's id of padding for tokenizers that have none."""


@dataclasses.dataclass
class TokenDatasetConfig(GPTDatasetConfig):
    """megatron-core's configuration, and what it lacks."""

    padded_vocab_size: int = 0
    """Token ids must be below this."""
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    """Prefix of each dataset -> the fingerprint of its content."""


class TokenDataset(GPTDataset):
    """GPTDataset that fills its cache where it is missing and checks the token ids it reads.

    Every id of the corpus is read as it is, and no loss is masked but what the flags say. Samples
    are cut from the joined documents, so that none is padded; megatron-core all the same reads the
    tokenizer's pad token as id 0 and masks its loss, wherever a corpus has it.
    """

    config: TokenDatasetConfig

    def __init__(self, *args: Any, **kwargs: Any):
        with warnings.catch_warnings():
            # It does not matter here that the pad token is another special token, too.
            warnings.filterwarnings("ignore", message="The pad token id")
            super().__init__(*args, **kwargs)
        self._pad_token_id = _NO_TOKEN

    def _build_document_sample_shuffle_indices(self) -> Arrays:
        directory = self.config.path_to_cache
        if directory is None:
            # megatron-core's own place for it, beside the data.
            directory = os.path.join(self.dataset.path_prefix, "cache", "GPTDataset_indices")
        key = _cache_key(
            self.unique_description, self.config.fingerprints[self.dataset.path_prefix]
        )
        with _built_in_memory(self, "megatron.core.datasets.gpt_dataset"):
            return _load_or_build(
                directory,
                f"{key}-{self.index_split.name}",
                ("document_index", "sample_index", "shuffle_index"),
                super()._build_document_sample_shuffle_indices,
            )

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, ...]:
        # Since 0.19 a third value, the documents' lengths.
        tokens, documents, *more = super()._query_document_sample_shuffle_indices(idx)
        largest = int(tokens.max())
        if largest >= self.config.padded_vocab_size or tokens.min() < 0:
            raise DataError(
                f"{self.dataset.path_prefix}.bin: a sample of documents {documents[:3].tolist()} "
                f"has token ids from {int(tokens.min())} to {largest}, but the model has "
                f"{self.config.padded_vocab_size} entries. The data was made with another "
                "tokenizer: preprocess it with this run's --tokenizer-model, or raise --vocab-size"
            )
        return tokens, documents, *more


class CachedBlendedDataset(BlendedDataset):
    """BlendedDataset with the same kind of cache; without --data-cache-path it has none."""

    config: TokenDatasetConfig

    def _build_indices(self) -> Arrays:
        directory = self.config.path_to_cache
        with _built_in_memory(self, "megatron.core.datasets.blended_dataset"):
            if directory is None:
                return super()._build_indices()
            lengths = ",".join(str(len(dataset)) for dataset in self.datasets)
            return _load_or_build(
                directory,
                f"{_cache_key(self.unique_description, lengths)}-{self.split.name}",
                ("dataset_index", "dataset_sample_index"),
                super()._build_indices,
            )


class TokenDatasetBuilder(BlendedMegatronDatasetBuilder):
    """Builds the two classes above on the calling rank alone; node_order says whose turn it is."""

    @staticmethod
    def build_generic_dataset(
        cls: Callable, is_built_on_rank: Callable, synchronize_ranks: bool, *args: Any
    ) -> Any:
        return (CachedBlendedDataset if cls is BlendedDataset else cls)(*args)

    def _build_megatron_datasets_parallel(
        self, prefixes: list[str], split: list, sizes_per_dataset: list[list[int]]
    ) -> list[list]:
        datasets: list[list] = [[] for _ in Split]
        for prefix, sizes in zip(prefixes, sizes_per_dataset, strict=True):
            built = self._build_megatron_dataset_splits(prefix, split, sizes)
            for of_split, dataset in zip(datasets, built, strict=True):
                of_split.append(dataset)
        return datasets


def _cache_key(description: str, content: str) -> str:
    return hashlib.sha256(f"{description}\n{content}".encode()).hexdigest()[:32]


@contextlib.contextmanager
def _built_in_memory(dataset: GPTDataset | BlendedDataset, logger_name: str) -> Iterator[None]:
    """megatron-core neither looks for a cache nor writes one while its path is empty."""
    original = dataset.config
    dataset.config = copy.copy(original)
    dataset.config.path_to_cache = ""
    logger = logging.getLogger(logger_name)
    level = logger.level
    # It warns that nothing is cached, which is what `_load_or_build` is about to do.
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        dataset.config = original
        logger.setLevel(level)


def _load_or_build(
    directory: str, key: str, names: tuple[str, ...], build: Callable[[], Arrays]
) -> Arrays:
    paths = [os.path.join(directory, f"{key}-{name}.npy") for name in names]
    if not all(map(os.path.isfile, paths)):
        arrays = build()
        try:
            os.makedirs(directory, exist_ok=True)
            for path, array in zip(paths, arrays, strict=True):
                _save(path, array)
        except OSError as error:
            raise DataError(
                f"{directory}: the index of the samples cannot be written there "
                f"({error.strerror}). Give a directory with room that can be written to: "
                "--data-cache-path DIR"
            ) from error
    return tuple(map(_load, paths))


def _save(path: str, array: np.ndarray) -> None:
    """The array, and before it its checksum: who finds the array finds both."""
    checksum = f"{_checksum(array):08x}\n".encode()
    _replace(path + _SUM, lambda stream: stream.write(checksum))
    _replace(path, lambda stream: np.save(stream, array, allow_pickle=False))


def _replace(path: str, write: Callable[[IO[bytes]], object]) -> None:
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            write(stream)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _checksum(array: np.ndarray) -> int:
    """Of its numbers, their type and their shape."""
    checksum = zlib.crc32(f"{array.dtype.str} {array.shape}".encode())
    numbers = array.reshape(-1)
    for begin in range(0, len(numbers), _CHUNK):
        checksum = zlib.crc32(np.ascontiguousarray(numbers[begin : begin + _CHUNK]).data, checksum)
    return checksum


def _load(path: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
        # Caches of earlier versions have none.
        if os.path.isfile(path + _SUM):
            with open(path + _SUM, "rb") as stream:
                expected = stream.read(9)
            if expected != f"{_checksum(array):08x}\n".encode():
                raise ValueError("its checksum is another")
    # NumPy evaluates the header: SyntaxError, MemoryError and others on a damaged one.
    except Exception as error:
        raise DataError(
            f"{path}: a damaged file of the index cache ({error}). Delete it; it is built again"
        ) from error
    return array
