"""Small datasets for the tests of this folder."""

from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_memory.data.tokenizers import build_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden/preprocess"
NUM_IDS = 1000


def write_dataset(prefix: Path, documents: list, dtype: type = np.uint16) -> str:
    """Write documents of token ids as a pair; returns its prefix."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        tokens = np.asarray(document, dtype=dtype)
        builder.add_document(tokens, [len(tokens)] if len(tokens) else [])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def random_documents(count: int, seed: int = 0, shortest: int = 5, longest: int = 60) -> list:
    """Documents of random ids below NUM_IDS, each ended by id 0."""
    random = np.random.default_rng(seed)
    lengths = random.integers(shortest, longest, count)
    return [np.append(random.integers(1, NUM_IDS, length), 0) for length in lengths]


def null_tokenizer():
    """Ids from 0 to NUM_IDS, the last of them the end of a document."""
    return build_tokenizer("NullTokenizer", vocab_size=NUM_IDS)
