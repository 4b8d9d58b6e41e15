"""JSON and YAML of which neither the length nor the depth nor a number in it is out of bounds."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.plain_data import check_extent

LARGEST_JSON = 256 << 20
"""Bytes; the longest that models have, a tokenizer's or an index of shards, are tens of MB."""
LARGEST_YAML = 1 << 20
"""Bytes; a configuration has some thousands."""
_DEEPEST_YAML = 4
_LARGEST_NUMBER_BITS = 64


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file to read. Waits for no pipe, and opens no device.

    Raises:
        OSError: it cannot be read.
        UnsafeFile: it is no file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise UnsafeFile("it is no regular file")


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a file of at most `most` bytes.

    Raises:
        OSError: it cannot be read.
        UnsafeFile: it is longer, or no file.
    """
    with open_regular(path) as stream:
        content = stream.read(most + 1)
    if len(content) > most:
        raise UnsafeFile(f"it has more than {most} bytes, and no such file needs as many")
    return content


def parse_json(content: bytes | str, *, limits_depth: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        content: the text.
        limits_depth: whether to refuse lists that Python itself can still walk through; to look
            takes as long as to parse.

    Raises:
        UnsafeFile: it is none, nests too deeply, or has a key twice.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise UnsafeFile("its lists lie too deep in each other") from None
    except ValueError as error:
        raise UnsafeFile(f"it is not valid JSON: {error}") from error
    if limits_depth:
        check_extent(value, len(text) + 1)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise UnsafeFile(f"it has the key {twice!r:.80} twice")
    return found


def read_json(path: Path, error_type: type[Exception], most: int = LARGEST_JSON) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        error_type: it is missing, damaged or none; the text names the file.
    """
    try:
        value = parse_json(read_bounded(path, most))
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {error.strerror}") from error
    except UnsafeFile as error:
        raise error_type(f"{path}: cannot be read: {error}. Copy it again") from error
    if not isinstance(value, dict):
        raise error_type(f"{path}: cannot be read: it holds no JSON object. Copy it again")
    return value


def parse_yaml_pairs(content: bytes) -> list[tuple[Any, Any]]:
    """The top-level keys and values of a YAML text, repeated keys included.

    Raises:
        UnsafeFile: it is none, nests too deeply, or a value in it is out of bounds.
    """
    try:
        text = content.decode("utf-8")
        _check_yaml_events(text)
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        if document is None:
            return []
        if not isinstance(document, yaml.MappingNode):
            raise UnsafeFile("it is not a list of settings: write one `key: value` on each line")
        constructor = yaml.SafeLoader("")
        return [
            (_constructed(constructor, key), _constructed(constructor, value))
            for key, value in document.value
        ]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnsafeFile(f"it is not valid YAML: {error}") from error


def _check_yaml_events(text: str) -> None:
    """Before anything is built of it, and no further than to what is wrong."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise UnsafeFile(f"line {line} refers to another (*{event.anchor:.80}): write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST_YAML:
            line = event.start_mark.line + 1
            raise UnsafeFile(f"line {line} nests too deeply: settings are flat")


def _constructed(constructor: yaml.SafeLoader, node: yaml.Node) -> Any:
    line = node.start_mark.line + 1
    try:
        value = constructor.construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    # A date of a 13th month, a number of more digits than Python reads, a wrong tag.
    except Exception as error:
        raise UnsafeFile(f"line {line} cannot be read: {error or type(error).__name__}") from error
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and number.bit_length() > _LARGEST_NUMBER_BITS:
            raise UnsafeFile(
                f"line {line} has a whole number of {number.bit_length()} bits: give a smaller one"
            )
    return value
