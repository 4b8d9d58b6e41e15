"""Whether a checkpoint's list of tensors makes sense: each tensor covered by its pieces exactly
once, and each piece in a place of its own in the files."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, int], ...]
"""Begin and end in each dimension."""


def check_coverage(metadata: Metadata) -> None:
    """Check a list that `read_metadata` has read.

    Raises:
        ValueError: names the tensor or the file, and what is wrong.
    """
    places = dict(metadata.storage_data)
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            _check_tensor(key, stored)
            for chunk in stored.chunks:
                _check_place(key, stored, chunk, places)
        elif places.pop(MetadataIndex(key), None) is None:
            raise ValueError(f"{key} has no place in the files")
    if places:
        raise ValueError(f"the files hold a part of {next(iter(places)).fqn} that is not listed")
    _check_apart(metadata)


def _check_place(
    key: str,
    stored: TensorStorageMetadata,
    chunk: ChunkStorageMetadata,
    places: dict[MetadataIndex, object],
) -> None:
    place = places.pop(MetadataIndex(key, chunk.offsets), None)
    # A tensor that was saved as a whole may have no offsets in its place in the list.
    if place is None and len(stored.chunks) == 1:
        place = places.pop(MetadataIndex(key), None)
    if place is None:
        raise ValueError(f"the part of {key} at {list(chunk.offsets)} has no place in the files")
    needed = math.prod(chunk.sizes) * stored.properties.dtype.itemsize
    if place.length < needed:  # type: ignore[attr-defined]
        raise ValueError(
            f"the part of {key} at {list(chunk.offsets)} takes {needed} bytes, and has a place "
            f"of {place.length}"  # type: ignore[attr-defined]
        )


def _check_tensor(key: str, stored: TensorStorageMetadata) -> None:
    whole = tuple((0, size) for size in stored.size)
    boxes = []
    for chunk in stored.chunks:
        if len(chunk.sizes) != len(whole) or len(chunk.offsets) != len(whole):
            raise ValueError(f"{key} is cut as {list(chunk.sizes)} of {list(stored.size)}")
        box = tuple((o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        if any(end > size for (_, end), size in zip(box, stored.size, strict=True)):
            raise ValueError(
                f"{key} is cut as {list(chunk.sizes)} at {list(chunk.offsets)}, outside of its "
                f"shape {list(stored.size)}"
            )
        boxes.append(box)
    volume = math.prod(stored.size)
    covered = sum(_volume(box) for box in boxes)
    if covered != volume:
        raise ValueError(
            f"{key} has {volume} numbers, and its parts have {covered}: some are missing or twice"
        )
    if not _are_apart([box for box in boxes if _volume(box)]):
        raise ValueError(f"parts of {key} overlap, and others are missing")


def _volume(box: Box) -> int:
    return math.prod(end - begin for begin, end in box)


def _are_apart(boxes: list[Box]) -> bool:
    """Whether no two boxes overlap.

    Cuts the boxes apart, dimension by dimension, where a cut goes through none of them: so lie the
    shards of every parallel layout. Those that cannot be cut so are compared in pairs.
    """
    pending = [boxes]
    while pending:
        group = pending.pop()
        if len(group) < 2:
            continue
        parts = next((p for d in range(len(group[0])) if len(p := _cut(group, d)) > 1), None)
        if parts is not None:
            pending += parts
        elif len(group) > _MOST_COMPARED or any(map(_overlap, *_pairs(group))):
            return False
    return True


_MOST_COMPARED = 1000


def _cut(boxes: Sequence[Box], dimension: int) -> list[list[Box]]:
    """The boxes in groups whose extents along a dimension do not overlap."""
    parts: list[list[Box]] = []
    reached = 0
    for box in sorted(boxes, key=lambda box: box[dimension]):
        begin, end = box[dimension]
        if not parts or begin >= reached:
            parts.append([])
        parts[-1].append(box)
        reached = max(reached, end)
    return parts


def _pairs(boxes: Sequence[Box]) -> tuple[Iterable[Box], Iterable[Box]]:
    pairs = [(one, other) for i, one in enumerate(boxes) for other in boxes[:i]]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _overlap(one: Box, other: Box) -> bool:
    return all(a < d and c < b for (a, b), (c, d) in zip(one, other, strict=True))


def _check_apart(metadata: Metadata) -> None:
    """No two parts in one place of a file: reading one of them would give the other's numbers."""
    reached: dict[str, int] = {}
    for stored in sorted(
        metadata.storage_data.values(), key=lambda stored: (stored.relative_path, stored.offset)
    ):
        name = stored.relative_path
        if Path(name).name != name:
            raise ValueError(f"it names a file outside of the checkpoint, {name!r:.200}")
        if stored.offset < reached.get(name, 0):
            raise ValueError(f"two parts lie at byte {stored.offset} of {name}")
        reached[name] = stored.offset + stored.length
