"""Random damage to a checkpoint's folder, of the kinds that disks, networks and people do."""

import os
import random
from collections.abc import Callable
from pathlib import Path


def _flip(folder: Path, file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    place, bit = chance.randrange(len(content)), chance.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place}"


def _truncate(folder: Path, file: Path, chance: random.Random) -> str:
    length = chance.randrange(file.stat().st_size)
    os.truncate(file, length)
    return f"cut to {length}"


def _append(folder: Path, file: Path, chance: random.Random) -> str:
    more = chance.randbytes(chance.choice([1, 8, 5000]))
    with open(file, "ab") as stream:
        stream.write(more)
    return f"{len(more)} bytes more"


def _zero(folder: Path, file: Path, chance: random.Random) -> str:
    """A sector that was never written; where it held zeros already, one byte of it is not."""
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    end = min(len(content), place + 4096)
    content[place:end] = bytes(end - place)
    if bytes(content) == file.read_bytes():
        content[place] = 255
    file.write_bytes(content)
    return f"zeros from {place} to {end}"


def _move_bytes(folder: Path, file: Path, chance: random.Random) -> str:
    """Two halves of a part change places."""
    content = file.read_bytes()
    cut = chance.randrange(1, len(content))
    moved = content[cut:] + content[:cut]
    if moved == content:
        return _flip(folder, file, chance)
    file.write_bytes(moved)
    return f"turned at {cut}"


def _swap(folder: Path, file: Path, chance: random.Random) -> str:
    others = [other for other in folder.iterdir() if other.read_bytes() != file.read_bytes()]
    other = chance.choice(sorted(others))
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)
    return f"swapped with {other.name}"


def _delete(folder: Path, file: Path, chance: random.Random) -> str:
    file.unlink()
    return "deleted"


def _add(folder: Path, file: Path, chance: random.Random) -> str:
    name = chance.choice(["__7_0.distcp", file.name + "~", ".hidden", "sub/file"])
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(file.read_bytes())
    return f"copied to {name}"


def _rename(folder: Path, file: Path, chance: random.Random) -> str:
    file.rename(folder / (file.name + ".1"))
    return f"renamed to {file.name}.1"


KINDS: dict[str, Callable[[Path, Path, random.Random], str]] = {
    "flip": _flip,
    "truncate": _truncate,
    "append": _append,
    "zero": _zero,
    "move": _move_bytes,
    "swap": _swap,
    "delete": _delete,
    "add": _add,
    "rename": _rename,
}


def damage(folder: Path, chance: random.Random) -> str:
    """Do one thing to one file; returns what, and to which.

    Half of all damages are single flipped bits.
    """
    kind = "flip" if chance.random() < 0.5 else chance.choice([*KINDS])
    file = chance.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))
    return f"{kind} {file.name}: {KINDS[kind](folder, file, chance)}"
