"""Lines of JSON and rows of tables to the texts in them."""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_memory.data.preprocess.blocks import Block, LineBlock, RowBlock

NUM_NAMED = 10
"""Bad records of a block of which is said what is wrong; the others are counted."""

# A key of which a letter is an escape: `json.dumps` writes so what is not ASCII.
_ESCAPED_KEY = re.compile(r'\\[u/][^"\\]*"\s*:')

_scan_json: Callable[[str, int], tuple[Any, int]] = vars(json.JSONDecoder())["scan_once"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """The texts of a block's good records, and what is wrong with the others."""

    texts: dict[str, list[str]]
    """For each key a text of each document."""
    numbers: Sequence[int]
    """The line or row of each document, counted from 1 in its file."""
    problems: list[tuple[int, str]]
    """Number of the first bad lines or rows, NUM_NAMED at most, and what is wrong with each."""
    num_problems: int
    """All of them."""


def read_documents(block: Block, keys: tuple[str, ...]) -> Documents:
    """The documents of a block. Nothing is raised for a bad record: it is among the problems."""
    if block.problem is not None:
        none: dict[str, list[str]] = {key: [] for key in keys}
        problems = [(block.first_record, block.problem)]
        return Documents(texts=none, numbers=[], problems=problems, num_problems=1)
    if isinstance(block, RowBlock):
        return _read_rows(block, keys)
    parsed = _parse_good_lines(block, keys)
    if parsed is not None:
        first = block.first_record
        numbers = range(first, first + len(parsed[keys[0]]))
        return Documents(texts=parsed, numbers=numbers, problems=[], num_problems=0)
    lines = block.lines.split(b"\n")[:-1]
    calls = (functools.partial(_parse_line, line.rstrip(b"\r"), keys) for line in lines)
    return _good_documents(calls, block, keys)


def _good_documents(
    records: Iterable[Callable[[], list[str]]], block: Block, keys: tuple[str, ...]
) -> Documents:
    """Gathers what the calls return, one for each record: texts in the order of the keys.

    A call raises _BadRecord where there is no such text.
    """
    texts: dict[str, list[str]] = {key: [] for key in keys}
    good: list[int] = []
    problems: list[tuple[int, str]] = []
    number = block.first_record - 1
    for number, read in enumerate(records, block.first_record):
        try:
            of_record = read()
        except _BadRecord as error:
            if len(problems) < NUM_NAMED:
                problems.append((number, str(error)))
            continue
        good.append(number)
        for key, text in zip(keys, of_record, strict=True):
            texts[key].append(text)
    num_problems = number + 1 - block.first_record - len(good)
    return Documents(texts=texts, numbers=good, problems=problems, num_problems=num_problems)


def _read_rows(block: RowBlock, keys: tuple[str, ...]) -> Documents:
    rows = zip(*(block.texts[key] for key in keys), strict=True)
    return _good_documents((functools.partial(_check_row, row, keys) for row in rows), block, keys)


def _check_row(row: tuple[str | None, ...], keys: tuple[str, ...]) -> list[str]:
    texts = [text for text in row if text is not None]
    if len(texts) < len(row):
        raise _BadRecord(f"{keys[row.index(None)]!r} holds null, not a string. Fill or remove it")
    return texts


def _parse_good_lines(block: LineBlock, keys: tuple[str, ...]) -> dict[str, list[str]] | None:
    """The texts of each key, if every line is as it should be; else None.

    The block is scanned as one text, which takes a quarter of the time of a `json.loads` a line.
    """
    lines = block.lines.replace(b"\r\n", b"\n") if b"\r" in block.lines else block.lines
    documents, position = [], 0
    try:
        text = lines.decode("utf-8")
        while position < len(text):
            document, end = _scan_json(text, position)
            if text[end] != "\n":
                return None
            documents.append(document)
            position = end + 1
        texts = {key: [document[key] for document in documents] for key in keys}
    # Whatever is wrong, it is found again line by line.
    except (ValueError, KeyError, TypeError, IndexError, StopIteration, RecursionError):
        return None
    # A document that goes on over a line's end is no line of JSON. Two cannot be in one line.
    if len(documents) != lines.count(b"\n"):
        return None
    if any(set(map(type, column)) != {str} for column in texts.values()):
        return None
    # A key twice in a line: Python keeps the last and loses the first.
    if any(_times_named(key, text) > len(documents) for key in keys):
        return None
    # Spelled otherwise it would not be counted.
    if _ESCAPED_KEY.search(text):
        return None
    return texts


def _times_named(key: str, text: str) -> int:
    """How often a key is named, in nested objects too. As a value it is no name."""
    quoted = json.dumps(key, ensure_ascii=False)
    return len(re.findall(re.escape(quoted) + r"\s*:", text))


class _BadRecord(Exception):
    """Says what is wrong with a line or row, and how to fix it."""


def _parse_line(line: bytes, keys: tuple[str, ...]) -> list[str]:
    try:
        document = json.loads(line.decode("utf-8"), object_pairs_hook=_Pairs)
    except UnicodeDecodeError as error:
        raise _BadRecord(f"not UTF-8 ({error}). Save the file as UTF-8") from error
    # Not only JSONDecodeError: a number of thousands of digits is another ValueError.
    except (ValueError, RecursionError) as error:
        shown = line[:60].decode("utf-8", errors="replace")
        raise _BadRecord(
            f"not valid JSON ({error}): {shown!r}. Each line must be one JSON object; "
            "fix or remove the line"
        ) from error
    if not isinstance(document, _Pairs):
        raise _BadRecord(
            f"a JSON {type(document).__name__}, not an object. Each line must be an "
            f"object with the keys of --json-keys: {', '.join(keys)}"
        )
    return [_text_of(document, key) for key in keys]


class _Pairs(dict[str, Any]):
    """A JSON object that knows which keys it has more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = collections.Counter(key for key, _ in pairs) if len(pairs) > len(self) else {}
        self.repeated = {key for key, count in counts.items() if count > 1}


def _text_of(document: _Pairs, key: str) -> str:
    if key in document.repeated:
        raise _BadRecord(f"has the key {key!r} more than once: which is meant? Remove all but one")
    if key not in document:
        raise _BadRecord(
            f"has no key {key!r}, only {', '.join(sorted(document)) or 'none'}. Give the "
            "keys that hold text to --json-keys, or fix the line"
        )
    text = document[key]
    if not isinstance(text, str):
        raise _BadRecord(
            f"{key!r} holds {type(text).__name__}, not a string. Make it a string, or "
            "name another key in --json-keys"
        )
    return text
