"""One pair into several."""

import math
from collections.abc import Sequence
from typing import Any

import megatron_memory
from megatron_memory.data.index_files import IndexSummary, check_indexed_dataset
from megatron_memory.data.indexed.manifest import FORMAT, read_manifest
from megatron_memory.data.indexed.streaming import TokenStream, copy_documents, new_pairs
from megatron_memory.data.indexed.writer import PairWriter
from megatron_memory.exceptions import ConfigurationError, DataError


def split(prefix: str, outputs: Sequence[str], shares: Sequence[float]) -> list[tuple[int, int]]:
    """Cut a pair's documents, in their order, into several pairs.

    Args:
        prefix: of the pair.
        outputs: prefixes of the parts.
        shares: of each part; their sum is the whole.

    Returns:
        of each part its first document and the first behind it.

    Raises:
        ConfigurationError: shares that do not fit.
        DataError: the pair is damaged, or a part would be empty.
    """
    if len(shares) != len(outputs):
        raise ConfigurationError(
            f"--shares has {len(shares)} numbers for {len(outputs)} outputs. Give one for each"
        )
    # Of finite ones the sum may still not be.
    if not (min(shares) > 0 and math.isfinite(sum(shares))):
        raise ConfigurationError(
            f"--shares {','.join(map(str, shares))}: each must be above 0, and finite"
        )
    pair = check_indexed_dataset(prefix)
    total, sum_before, ends = sum(shares), 0.0, []
    for share in shares:
        sum_before += share
        ends.append(round(pair.num_documents * sum_before / total))
    return _write_parts(pair, outputs, ends)


def split_after(prefix: str, outputs: Sequence[str], num_documents: int) -> list[tuple[int, int]]:
    """Cut a pair into its first `num_documents` documents and the others; see `split`."""
    if len(outputs) != 2:
        raise ConfigurationError(f"--documents makes 2 parts, not {len(outputs)}")
    pair = check_indexed_dataset(prefix)
    if not 0 < num_documents < pair.num_documents:
        raise ConfigurationError(
            f"--documents {num_documents}: must be above 0 and below the "
            f"{pair.num_documents} documents of {prefix}"
        )
    return _write_parts(pair, outputs, [num_documents, pair.num_documents])


def _write_parts(
    pair: IndexSummary, outputs: Sequence[str], ends: Sequence[int]
) -> list[tuple[int, int]]:
    parts = list(zip([0, *ends[:-1]], ends, strict=True))
    for output, (begin, end) in zip(outputs, parts, strict=True):
        if pair.document_bounds[begin] == pair.document_bounds[end]:
            raise DataError(
                f"{output}: would hold no text: it has documents {begin} to {end} of "
                f"{pair.num_documents}. Make its share larger"
            )
    manifest = read_manifest(pair.prefix)
    with new_pairs(outputs, pair.dtype, [pair.prefix]) as writers, TokenStream(pair) as tokens:
        for writer, (begin, end) in zip(writers, parts, strict=True):
            copy_documents(pair, tokens, begin, end, writer)
            writer.finish()
        for writer, part in zip(writers, parts, strict=True):
            writer.publish(_manifest_of_part(pair, manifest, writer, part))
    return parts


def _manifest_of_part(
    pair: IndexSummary, manifest: dict | None, writer: PairWriter, part: tuple[int, int]
) -> dict[str, Any]:
    return {
        # What the whole was made of and with is true of a part; its `run` is not.
        **{key: value for key, value in (manifest or {}).items() if key != "run"},
        "format": FORMAT,
        "made_by": f"megatron-memory {megatron_memory.__version__}, tools/dataset.py split",
        "documents": writer.extent.num_documents,
        "sequences": writer.extent.num_sequences,
        "tokens": writer.extent.num_tokens,
        "dtype": writer.dtype.name,
        "split_from": {"path": pair.prefix, "documents": list(part)},
    }
