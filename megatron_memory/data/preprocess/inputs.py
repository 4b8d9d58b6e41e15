"""Which files --input names."""

import glob
import os
import stat
import sys
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

    Links are followed where they are named, or lead from a folder to a file, which is said. Links
    from a folder to another are not, so that there are no loops; that is said, too.

    Raises:
        ConfigurationError: a kind of file that is not read, or standard input beside others.
        DataError: a name or pattern that matches no file, or what is no file: a FIFO, a device.
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
    if os.path.lexists(name):
        return [_checked(name)]
    matched = [path for path in glob.glob(name, recursive=True) if not os.path.isdir(path)]
    if not matched:
        raise DataError(
            f"--input {name}: no such file. Give files, folders, patterns, or - for standard input"
        )
    return sorted(map(_checked, matched))


def _in_folder(folder: str) -> list[str]:
    """Files below a folder: links to files are read, those to folders are not gone into."""
    found = []
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path):
                _say(f"--input {path}: a link to a folder is not followed; name it to read it")
        found += [
            _checked(os.path.join(parent, name))
            for name in files
            if name.endswith(_IN_FOLDERS) and not name.startswith(".")
        ]
    for path in filter(os.path.islink, sorted(found)):
        _say(f"--input {path}: a link to {os.path.realpath(path)}, which is read")
    return sorted(found)


def _checked(path: str) -> str:
    """A path, of a file that has an end.

    Raises:
        DataError: it is a link to nothing, or no file: reading a FIFO or a device may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        target = f", a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise DataError(
            f"--input {path}{target}: cannot be read ({error.strerror}). Copy it again, or "
            "remove it"
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {"FIFO": stat.S_ISFIFO, "socket": stat.S_ISSOCK, "folder": stat.S_ISDIR}
        kind = next((name for name, is_kind in kinds.items() if is_kind(mode)), "device")
        raise DataError(
            f"--input {path}: a {kind}, not a file. Pipe its text into standard input: --input -, "
            "or remove it from the folder"
        )
    return path


def _raise_unreadable(error: OSError) -> None:
    raise DataError(
        f"--input {error.filename}: cannot be read ({error.strerror}). Change its permissions, or "
        "name the files to read"
    ) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def is_table(path: str) -> bool:
    """Whether an input has rows and columns, and not lines."""
    return path.endswith(_TABLE_ENDING)


def size_of(path: str) -> int | None:
    """Bytes of an input on disk; None for standard input."""
    return None if path == STANDARD_INPUT else os.path.getsize(path)
