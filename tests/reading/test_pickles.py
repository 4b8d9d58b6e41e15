"""Pickles are read by us alone, and nothing that they ask for is done."""

import collections
import pickle
import random
import time
from typing import Any

import pytest

from megatron_memory.reading.pickles import Maker, UnsafeFile, read_pickle
from megatron_memory.reading.plain_data import check_extent
from tests.bounded import within
from tests.hostile import hostile_pickles, mutated, named

MIB = 1 << 20
MOST = 1024 * MIB
VALUES = [
    None,
    True,
    0,
    255,
    65_535,
    -1,
    2**31 - 1,
    -(2**31),
    2**63,
    -(2**63),
    1.5,
    float("inf"),
    "",
    "ü" * 300,
    b"",
    b"x" * 300,
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    tuple(range(9)),
    [],
    [[], [1, [2]]],
    {},
    {"a": 1, 2: "b", None: [True], False: {}},
]


def _nothing(module: str, name: str) -> Any:
    raise UnsafeFile(f"{module}.{name}")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_those_that_were_written(protocol: int):
    for value in [*VALUES, VALUES]:
        if protocol == 2 and b"" in (value if isinstance(value, list) else [value]):
            continue
        if protocol == 2 and isinstance(value, bytes):
            continue  # By a call of _codecs.encode, which torch_files knows.
        read = read_pickle(pickle.dumps(value, protocol), _nothing)
        assert read == value and type(read) is type(value)


def test_references_give_the_same_object():
    inner = [1]
    read = read_pickle(pickle.dumps([inner, inner]), _nothing)
    assert read[0] is read[1]


@pytest.mark.parametrize(("name", "content"), [*hostile_pickles()], ids=named)
def test_hostile_pickles_are_refused(name: str, content: bytes):
    def read() -> None:
        with pytest.raises(UnsafeFile) as caught:
            value = read_pickle(content, _nothing)
            check_extent(value, len(content))
        assert str(caught.value) and "MemoryError" not in str(caught.value)

    begin = time.process_time()
    grown = within(MOST, read)
    # A mark or a list is one byte of the file, and a list of its own here.
    assert grown < 64 * MIB + 200 * len(content)
    assert time.process_time() - begin < 10


class _Point:
    x = y = 0


def _point_maker() -> Maker:
    return Maker(
        name="a.Point",
        new=_Point,
        fill=lambda made, state: made.__dict__.update(x=state["x"], y=state["y"]),
    )


def _find_point(module: str, name: str) -> Any:
    if (module, name) == (_Point.__module__, "_Point"):
        return _POINT
    raise UnsafeFile(f"{module}.{name}")


_POINT = _point_maker()


def test_objects_come_from_their_makers_alone():
    point = _Point()
    point.x, point.y = 3, 4
    for protocol in (2, 4, 5):
        read = read_pickle(pickle.dumps([point, point], protocol), _find_point)
        assert (read[0].x, read[0].y) == (3, 4) and read[0] is read[1]


@pytest.mark.parametrize(
    "operations",
    [
        b")\x81",  # Without its state.
        b")\x81}b",  # A state that lacks what its maker wants.
        b"K\x01\x85\x81}b",  # Made of something.
        b"}b",  # The state of the class itself.
        b")R",  # Called, though it is a class to be made.
        b")\x81}\x8c\x01xK\x01\x8c\x01yK\x01ub}b",  # Filled twice.
    ],
)
def test_other_ways_to_make_them_are_refused(operations: bytes):
    module = _Point.__module__.encode()
    name = b"\x8c" + bytes([len(module)]) + module + b"\x8c\x06_Point\x93"
    if operations.endswith(b"ub}b"):
        operations = operations.replace(b"}\x8c\x01x", b"}(\x8c\x01x")
    with pytest.raises(UnsafeFile):
        read_pickle(b"\x80\x04" + name + operations + b".", _find_point)
    assert _Point.__dict__["x"] == 0 and "__setstate__" not in _Point.__dict__


def test_what_a_library_would_call_is_not_called():
    for value in (collections.OrderedDict(a=1), {1, 2}, frozenset([1]), 1j, range(3), print):
        with pytest.raises(UnsafeFile):
            read_pickle(pickle.dumps(value), _nothing)


def test_mutations_are_refused_or_pickles_to_python_too():
    """Whatever is accepted is what Python's own unpickler reads."""
    content, choose = pickle.dumps(VALUES), random.Random(0)
    accepted = 0
    for _ in range(2000):
        changed = mutated(content, choose)
        try:
            read = read_pickle(changed, _nothing)
        except UnsafeFile as error:
            assert str(error)
            continue
        accepted += 1
        assert repr(read) == repr(pickle.loads(changed))
    assert accepted > 50
