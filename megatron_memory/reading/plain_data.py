"""How deep and how large a value is that was read: references may make a small file a huge one."""

from typing import Any

from megatron_memory.reading.pickles import UnsafeFile

_DEEPEST = 64


def check_extent(value: Any, most: int) -> None:
    """That lists, tuples and dicts lie no deeper than 64 in each other, and not in themselves, and
    that walking through all of them meets at most `most` values.

    Looks at each object once, however often it is referred to.

    Raises:
        UnsafeFile: they do.
    """
    extents: dict[int, tuple[int, int] | None] = {}
    pending = [(value, False)]
    while pending:
        item, is_left = pending.pop()
        if not isinstance(item, dict | list | tuple):
            continue
        if is_left:
            extents[id(item)] = _extent(item, extents, most)
        elif id(item) not in extents:
            extents[id(item)] = None
            pending.append((item, True))
            pending.extend((inner, False) for inner in _inside(item))


def _inside(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item


def _extent(item: Any, extents: dict[int, tuple[int, int] | None], most: int) -> tuple[int, int]:
    """How deep it is, and how many values are in it."""
    depth, count = 0, 1
    for inner in _inside(item):
        if not isinstance(inner, dict | list | tuple):
            count += 1
            continue
        extent = extents[id(inner)]
        if extent is None:
            raise UnsafeFile("a list lies within itself")
        depth, count = max(depth, extent[0]), count + extent[1]
    if depth >= _DEEPEST:
        raise UnsafeFile(f"lists lie more than {_DEEPEST} deep in each other")
    if count > most:
        raise UnsafeFile(f"its references unfold to more than {most} values")
    return depth + 1, count
