"""Which files --input names."""

import glob
import os
from collections.abc import Iterable

from megatron_memory.exceptions import ConfigurationError, DataError

STANDARD_INPUT = "-"
ZSTD_ENDINGS = (".zst", ".zstd")
_TABLE_ENDING = ".parquet"
_IN_FOLDERS = (".jsonl", ".jsonl.gz", *(f".jsonl{end}" for end in ZSTD_ENDINGS), _TABLE_ENDING)
"""Endings of the files that are read of a folder; a file that is named may have any."""
_NOT_READ = (".bz2", ".xz", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".7z")


def expand_inputs(inputs: Iterable[str]) -> list[str]:
    """Files named by `inputs`: patterns expanded and sorted, of folders all corpora below, sorted.

    Raises:
        ConfigurationError: a kind of file that is not read, or standard input beside others.
        DataError: a name or pattern that matches no file.
    """
    names = list(inputs)
    if STANDARD_INPUT in names:
        if len(names) > 1:
            raise ConfigurationError(
                f"--input {' '.join(names)}: standard input (-) cannot be combined with others"
            )
        return names
    paths = [path for name in names for path in _expand(name)]
    for path in paths:
        if path.endswith(_NOT_READ):
            raise ConfigurationError(
                f"--input {path}: this kind of file is not read; make it JSON lines (plain, .gz "
                "or .zst) or Parquet, or unpack it into standard input: --input -"
            )
    return paths


def _expand(name: str) -> list[str]:
    if os.path.isdir(name):
        found = _in_folder(name)
        if not found:
            raise DataError(
                f"--input {name}: no file below this folder ends with {', '.join(_IN_FOLDERS)}. "
                f"Files with other endings can be named, or matched by a pattern: '{name}/*.json'"
            )
        return found
    if os.path.exists(name):
        return [name]
    matched = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
    if not matched:
        raise DataError(
            f"--input {name}: no such file. Give files, folders, patterns, or - for standard input"
        )
    return matched


def _in_folder(folder: str) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)
            for name in files
            if name.endswith(_IN_FOLDERS) and not name.startswith(".")
        ]
    return sorted(found)


def is_table(path: str) -> bool:
    """Whether an input has rows and columns, and not lines."""
    return path.endswith(_TABLE_ENDING)


def size_of(path: str) -> int | None:
    """Bytes of an input on disk; None for what has no size: standard input, pipes."""
    if path == STANDARD_INPUT or not os.path.isfile(path):
        return None
    return os.path.getsize(path)
