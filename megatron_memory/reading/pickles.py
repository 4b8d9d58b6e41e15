"""An interpreter of pickles that never imports, calls or changes what a file names.

Python's own unpickler asks `find_class` for a name and then calls, fills and changes whatever it
got, so that an allow-list of names is not enough. It also believes lengths and memo indices before
it looks whether the file is that long. Here each name stands for a `Maker` of the caller's, which
takes plain arguments; nothing else can be called or filled, and each opcode takes no more memory
than it has bytes, times a constant.
"""

import dataclasses
import gc
import struct
from collections.abc import Callable
from typing import Any


class UnsafeFile(ValueError):
    """A file is damaged, or asks for what no sound one needs; the text says what."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Maker:
    """What a class or function of a pickle stands for. Compared by identity alone."""

    name: str
    """As the pickle knows it, for messages."""
    call: Callable[[tuple[Any, ...]], Any] | None = None
    """Makes a value of the arguments; None: it cannot be called."""
    new: Callable[[], Any] | None = None
    """Makes an object without arguments; None: it cannot."""
    fill: Callable[[Any, Any], None] | None = None
    """Gives an object its state, once: a new one must get it, a called one may. None: it has
    none."""


Find = Callable[[str, str], Any]
"""Module and name -> a Maker or a plain value; raises UnsafeFile for what is not known."""

_LARGEST_KEY = 1 << 60
_LARGEST_NUMBER_BYTES = 16
_LONGEST_NAME = 256
_MOST_MARKS = 1000


def read_pickle(
    data: bytes,
    find: Find,
    *,
    persistent: Callable[[Any], Any] | None = None,
    key_types: tuple[type, ...] = (),
) -> Any:
    """The value that a pickle of protocol 2 to 5 describes.

    Args:
        data: the whole pickle and nothing behind it.
        find: what its names stand for.
        persistent: what its persistent ids stand for; None refuses them.
        key_types: of keys of dicts, besides text, whole numbers, booleans and None.

    Raises:
        UnsafeFile: it is damaged, or asks for what is not known.
    """
    machine = _Machine(data, find, persistent, key_types)
    is_collecting = gc.isenabled()
    # What is made here stays until the end: to look for garbage again and again takes most of the
    # time of a large file.
    gc.disable()
    try:
        return machine.run()
    except UnsafeFile:
        raise
    # What is missing on the stack, in the memo or behind the end; a maker's own checks.
    except Exception as error:
        raise UnsafeFile(
            f"byte {machine.position} of its pickle: {type(error).__name__} {str(error)[:200]}"
        ) from error
    finally:
        if is_collecting:
            gc.enable()


def shown(value: object) -> str:
    """A value for a message. Of a list only that it is one: references could unfold in it."""
    if isinstance(value, int) and value.bit_length() > 8 * _LARGEST_NUMBER_BYTES:
        return "a number too long to print"
    if value is None or type(value) in (bool, int, float, str, bytes):
        return f"{value!r:.200}"
    return f"a {type(value).__name__}"


class _Machine:
    def __init__(
        self,
        data: bytes,
        find: Find,
        persistent: Callable[[Any], Any] | None,
        key_types: tuple[type, ...],
    ):
        self.position = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        # Objects whose state is still to come, and whether it must, by identity; held, so that no
        # id is used again.
        self.unfilled: dict[int, tuple[Any, Maker, bool]] = {}
        self.is_done = False
        self._data = data
        self._find = find
        self._persistent = persistent
        self._key_types = frozenset((str, bool, type(None), *key_types))

    def run(self) -> Any:
        data, operations = self._data, _OPERATIONS
        while not self.is_done:
            operation = operations.get(data[self.position])
            if operation is None:
                raise UnsafeFile(
                    f"byte {self.position} of its pickle is {data[self.position]:#04x}, which no "
                    "such file needs"
                )
            self.position += 1
            operation(self)
        if self.position != len(data):
            raise UnsafeFile(f"{len(data) - self.position} bytes lie behind the end of its pickle")
        for _, maker, is_required in self.unfilled.values():
            if is_required:
                raise UnsafeFile(f"a {maker.name} has no content")
        (value,) = self.stack
        return value

    def take(self, count: int) -> bytes:
        """The next bytes of the pickle."""
        begin, self.position = self.position, self.position + count
        if not 0 <= count <= len(self._data) - begin:
            raise UnsafeFile(
                f"byte {begin} of its pickle announces {count} bytes, and "
                f"{len(self._data) - begin} are left"
            )
        return self._data[begin : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self._data.index(b"\n", self.position, self.position + _LONGEST_NAME)
        text = self._data[self.position : end].decode("ascii")
        self.position = end + 1
        return text

    def since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise UnsafeFile(f"it sets items of a {type(target).__name__}")
        for key in items[::2]:
            # Hashes of numbers are known beforehand: large ones could be made to collide.
            if type(key) not in self._key_types and not (
                type(key) is int and -_LARGEST_KEY < key < _LARGEST_KEY
            ):
                raise UnsafeFile(f"a key is {shown(key)}")
        expected = len(target) + len(items) // 2
        target.update(zip(items[::2], items[1::2], strict=True))
        if len(target) != expected:
            raise UnsafeFile("a dict has a key twice")

    def push_global(self, module: str, name: str) -> None:
        self.stack.append(self._find(module, name))

    def persistent_id(self) -> None:
        if self._persistent is None:
            raise UnsafeFile("it refers to something outside of its pickle")
        self.stack[-1] = self._persistent(self.stack[-1])

    def call(self) -> None:
        arguments = self.stack.pop()
        maker = self.stack.pop()
        if type(maker) is not Maker or maker.call is None or type(arguments) is not tuple:
            raise UnsafeFile(f"it calls {_called(maker)}, which no such file needs")
        made = maker.call(arguments)
        if maker.fill is not None:
            self.unfilled[id(made)] = (made, maker, False)
        self.stack.append(made)

    def new(self) -> None:
        arguments = self.stack.pop()
        maker = self.stack.pop()
        if type(maker) is not Maker or maker.new is None or arguments != ():
            raise UnsafeFile(f"it makes a new {_called(maker)}, which no such file needs")
        made = maker.new()
        if maker.fill is not None:
            self.unfilled[id(made)] = (made, maker, True)
        self.stack.append(made)

    def fill(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        _, maker, _ = self.unfilled.pop(id(target), (None, None, False))
        if maker is None or maker.fill is None:
            raise UnsafeFile(f"it changes {_called(target)}, which no such file needs")
        maker.fill(target, state)


def _called(value: Any) -> str:
    return value.name if type(value) is Maker else f"a {type(value).__name__}"


def _protocol(machine: _Machine) -> None:
    version = machine.number("<B")
    if machine.position != 2 or not 2 <= version <= 5:
        raise UnsafeFile(f"protocol {version} of pickle, at byte {machine.position - 2}")


def _frame(machine: _Machine) -> None:
    length = machine.number("<Q")
    if length > len(machine._data) - machine.position:
        raise UnsafeFile(f"a frame of {length} bytes, longer than the file")


def _stop(machine: _Machine) -> None:
    machine.is_done = True


def _mark(machine: _Machine) -> None:
    if len(machine.below) >= _MOST_MARKS:
        raise UnsafeFile(f"its pickle nests more than {_MOST_MARKS} deep")
    machine.below.append(machine.stack)
    machine.stack = []


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise UnsafeFile(f"it appends to a {type(target).__name__}")
    target.extend(items)


def _append_one(machine: _Machine) -> None:
    item = machine.stack.pop()
    _append(machine, [item])


def _append_many(machine: _Machine) -> None:
    _append(machine, machine.since_mark())


def _set_one(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items(machine.stack[-1], [key, value])


def _set_many(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.set_items(machine.stack[-1], items)


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise UnsafeFile("a tuple of more than there is")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return operation


def _tuple(machine: _Machine) -> None:
    items = machine.since_mark()
    machine.stack.append(tuple(items))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise UnsafeFile("a name is no text")
    machine.push_global(module, name)


def _text_global(machine: _Machine) -> None:
    module, name = machine.line(), machine.line()
    machine.push_global(module, name)


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _whole_number(machine: _Machine) -> None:
    count = machine.number("<B")
    if count > _LARGEST_NUMBER_BYTES:
        raise UnsafeFile(f"a number of {count} bytes")
    machine.stack.append(int.from_bytes(machine.take(count), "little", signed=True))


def _push(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(make())


def _push_number(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.number(form))


def _push_text(form: str) -> Callable[[_Machine], None]:
    # As pickle does: a folder's name may be no text, and torch writes it into `.metadata`.
    return lambda machine: machine.stack.append(
        machine.take(machine.number(form)).decode("utf-8", "surrogatepass")
    )


def _push_bytes(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.take(machine.number(form)))


def _get(form: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(machine.memo[machine.number(form)])


def _put(form: str) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.memo[machine.number(form)] = machine.stack[-1]

    return operation


# By Python's documentation of pickletools. Those of protocols 0 and 1, sets and what else no
# checkpoint has are left out on purpose.
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("."): _stop,
    ord("N"): _push(lambda: None),
    0x88: _push(lambda: True),
    0x89: _push(lambda: False),
    ord("K"): _push_number("<B"),
    ord("M"): _push_number("<H"),
    ord("J"): _push_number("<i"),
    ord("G"): _push_number(">d"),
    0x8A: _whole_number,
    0x8C: _push_text("<B"),
    ord("X"): _push_text("<I"),
    0x8D: _push_text("<Q"),
    ord("C"): _push_bytes("<B"),
    ord("B"): _push_bytes("<I"),
    0x8E: _push_bytes("<Q"),
    ord("]"): _push(list),
    ord("}"): _push(dict),
    ord(")"): _push(tuple),
    ord("("): _mark,
    ord("a"): _append_one,
    ord("e"): _append_many,
    ord("s"): _set_one,
    ord("u"): _set_many,
    ord("t"): _tuple,
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("h"): _get("<B"),
    ord("j"): _get("<I"),
    ord("q"): _put("<B"),
    ord("r"): _put("<I"),
    0x94: _memoize,
    ord("c"): _text_global,
    0x93: _stack_global,
    ord("Q"): _Machine.persistent_id,
    ord("R"): _Machine.call,
    0x81: _Machine.new,
    ord("b"): _Machine.fill,
}
