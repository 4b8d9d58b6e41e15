"""What an output depends on, for its journal and its manifest."""

import os
from typing import Any

import megatron_memory
from megatron_memory.data.indexed.manifest import FORMAT
from megatron_memory.data.preprocess.blocks import Position
from megatron_memory.data.preprocess.inputs import size_of
from megatron_memory.data.preprocess.journal import Identity, State, identity_hash
from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.tokenizer import TextTokenizer
from megatron_memory.exceptions import DataError


def identity_of(options: PreprocessOptions, paths: list[str], tokenizer: TextTokenizer) -> Identity:
    """All that the outputs of a run depend on. What may change on the way, such as the number of
    workers, is not in it."""
    return {
        "--json-keys": list(options.json_keys),
        "--append-eod": options.append_eod,
        "--tokenizer-hf-include-special-tokens": options.tokenizer_hf_include_special_tokens,
        "the tokenizer": tokenizer.hash,
        "--input": [[path, size_of(path), _modified(path)] for path in paths],
    }


def _modified(path: str) -> int | None:
    return None if size_of(path) is None else os.stat(path).st_mtime_ns


def check_same_run(before: Identity, now: Identity, journal_path: str) -> None:
    """That an interrupted run was told the same.

    Raises:
        DataError: names what is different.
    """
    for name, value in now.items():
        if before.get(name) == value:
            continue
        if name == "--input":
            raise DataError(
                "--resume: the inputs are not those of the interrupted run, or have changed since "
                f"({_first_difference(before.get(name), value)}). Give it the same files, or "
                f"remove {journal_path} to start over"
            )
        raise DataError(
            f"--resume: {name} was {before.get(name)} in the interrupted run and is {value} now. "
            f"Give it the same, or remove {journal_path} to start over"
        )


def _first_difference(before: Any, now: list[list]) -> str:
    for old, new in zip(before or [], now, strict=False):
        if old != new:
            return f"{new[0]}" if old[0] == new[0] else f"{old[0]} was there, {new[0]} is now"
    return f"{len(before or [])} files then, {len(now)} now"


def manifests_of(
    *,
    options: PreprocessOptions,
    paths: list[str],
    prefixes: dict[str, str],
    tokenizer: TextTokenizer,
    identity: Identity,
    dtype: str,
    state: State,
) -> dict[str, dict]:
    """The manifest of each output, by its prefix."""
    positions = {**state.finished_sources, state.position.source: state.position}
    sources = [_describe(path, positions.get(i, Position())) for i, path in enumerate(paths)]
    manifests = {}
    for key, prefix in prefixes.items():
        extent = state.extents[prefix]
        manifests[prefix] = {
            "format": FORMAT,
            "made_by": f"megatron-memory {megatron_memory.__version__}, tools/preprocess_data.py",
            "documents": extent.num_documents,
            "sequences": extent.num_sequences,
            "tokens": extent.num_tokens,
            "dtype": dtype,
            "tokenizer": {
                "type": options.tokenizer_type,
                "model": options.tokenizer_model,
                "vocab_size": tokenizer.vocab_size,
                "eod": tokenizer.eod,
                "hash": tokenizer.hash,
            },
            "append_eod": options.append_eod,
            "include_special_tokens": options.tokenizer_hf_include_special_tokens,
            "json_key": key,
            "skipped_lines": state.num_skipped,
            "max_document_bytes": options.max_document_bytes,
            "sources": sources,
            "run": identity_hash(identity),
        }
    return manifests


def _describe(path: str, position: Position) -> dict[str, Any]:
    return {
        "path": path,
        "bytes": size_of(path),
        "text_bytes": position.offset,
        "lines": position.records,
        "crc32": f"{position.crc32:08x}",
    }
