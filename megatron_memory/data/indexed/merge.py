"""Several pairs into one."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import megatron_memory
from megatron_memory.data.index_files import IndexSummary, check_indexed_dataset
from megatron_memory.data.indexed.format import named_twice
from megatron_memory.data.indexed.manifest import FORMAT, read_manifest
from megatron_memory.data.indexed.streaming import TokenStream, copy_documents, new_pairs
from megatron_memory.exceptions import DataError

_FLAGS = {
    "append_eod": "--append-eod",
    "include_special_tokens": "--tokenizer-hf-include-special-tokens",
}


def merge(prefixes: Sequence[str], output: str, dtype: str | None = None) -> list[str]:
    """Write the documents of several pairs, one pair after the other, as one.

    The files are those of Megatron-LM's tools/merge_datasets.py for the same order.

    Args:
        prefixes: of the pairs to merge.
        output: prefix of the new pair.
        dtype: of its token ids; None for that of the inputs.

    Returns:
        how the documents of one pair were made otherwise than those of another.

    Raises:
        DataError: a pair is damaged, two do not go together, or documents would be there twice.
    """
    pairs = [check_indexed_dataset(prefix) for prefix in prefixes]
    manifests = [read_manifest(prefix) for prefix in prefixes]
    _check_each_once(prefixes, manifests)
    found = _common_dtype(pairs) if dtype is None else np.dtype(dtype)
    _check_tokenizers(prefixes, manifests)
    with new_pairs([output], found, prefixes) as (writer,):
        for pair in pairs:
            with TokenStream(pair) as tokens:
                copy_documents(pair, tokens, 0, pair.num_documents, writer)
        writer.finish()
        writer.publish(_merged_manifest(pairs, manifests, found))
    return list(_made_otherwise(prefixes, manifests))


def _made_otherwise(prefixes: Sequence[str], manifests: Sequence[dict | None]) -> Iterator[str]:
    for field in ("append_eod", "include_special_tokens"):
        known = {
            prefix: manifest[field]
            for prefix, manifest in zip(prefixes, manifests, strict=True)
            if manifest is not None and field in manifest
        }
        first = next(iter(known), "")
        for prefix, value in known.items():
            if value != known[first]:
                flag = _FLAGS[field]
                one, other = (first, prefix) if known[first] else (prefix, first)
                yield (
                    f"{one} was made with {flag} and {other} without: the documents of the new "
                    "pair are not alike. Preprocess one of them again if that is not meant"
                )
                break


def pairs_in(folder: str) -> list[str]:
    """Prefixes of the pairs in a folder, sorted.

    Raises:
        DataError: there are none.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    found = [os.path.join(folder, name[:-4]) for name in names if name.endswith(".idx")]
    if not found:
        raise DataError(f"{folder}: holds no .idx files. Give a folder of .bin/.idx pairs")
    return found


def _common_dtype(pairs: Sequence[IndexSummary]) -> np.dtype:
    for pair in pairs:
        if pair.dtype != pairs[0].dtype:
            raise DataError(
                f"{pairs[0].prefix} holds {pairs[0].dtype.name} and {pair.prefix} "
                f"{pair.dtype.name}. Say by --dtype what the output is to hold, such as int32"
            )
    return pairs[0].dtype


def _check_each_once(prefixes: Sequence[str], manifests: Sequence[dict | None]) -> None:
    """That no documents are there twice, as far as names and manifests tell."""
    if (repeated := named_twice(prefixes)) is not None:
        raise DataError(f"{repeated}: is given more than once. Give each pair once")
    given = {os.path.abspath(prefix): prefix for prefix in prefixes}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        for part in (manifest or {}).get("merged_from", []):
            if (again := given.get(os.path.abspath(str(part.get("path"))))) is not None:
                raise DataError(
                    f"{prefix}: was merged from {again}, which is given as well, so that its "
                    "documents would be there twice. Leave one of the two out"
                )


def _check_tokenizers(prefixes: Sequence[str], manifests: Sequence[dict | None]) -> None:
    """That no two pairs are known to be of different tokenizers."""
    known = {
        prefix: hashed
        for prefix, manifest in zip(prefixes, manifests, strict=True)
        if (hashed := _tokenizer_hash(manifest)) is not None
    }
    for prefix, hashed in known.items():
        first = next(iter(known))
        if hashed != known[first]:
            raise DataError(
                f"{first} and {prefix} were made with different tokenizers, as their manifests "
                "say: an id means something else in each. Preprocess one of them again"
            )


def _tokenizer_hash(manifest: dict | None) -> str | None:
    return (manifest or {}).get("tokenizer", {}).get("hash")


def _merged_manifest(
    pairs: Sequence[IndexSummary], manifests: Sequence[dict | None], dtype: np.dtype
) -> dict[str, Any]:
    known = [manifest or {} for manifest in manifests]
    same = {}
    for field in ("tokenizer", "append_eod", "include_special_tokens", "json_key"):
        values = [manifest.get(field) for manifest in known]
        # Only what is true of every part.
        same[field] = values[0] if all(value == values[0] for value in values) else None
    if same["tokenizer"] is None and all(map(_tokenizer_hash, manifests)):
        # The same by its hash, from another place.
        same["tokenizer"] = known[0]["tokenizer"]
    return {
        "format": FORMAT,
        "made_by": f"megatron-memory {megatron_memory.__version__}, tools/dataset.py merge",
        "documents": sum(pair.num_documents for pair in pairs),
        "sequences": sum(pair.num_sequences for pair in pairs),
        "tokens": sum(pair.num_tokens for pair in pairs),
        "dtype": dtype.name,
        **{field: value for field, value in same.items() if value is not None},
        "skipped_lines": sum(manifest.get("skipped_lines", 0) for manifest in known),
        "sources": [source for manifest in known for source in manifest.get("sources", [])],
        "merged_from": [
            {"path": pair.prefix, "documents": pair.num_documents, "tokens": pair.num_tokens}
            for pair in pairs
        ],
    }
