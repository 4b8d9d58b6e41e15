"""Files that are damaged, or made to harm: changes to sound ones, and whole ones made by hand."""

import copy
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

_TEXT = (b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"9" * 30, b"true", b"0", b"../x")
# Each announces more than any of the test's files holds.
_LENGTHS = (2**31 - 1, 2**32 - 1, 2**63 - 1, 2**40)


def mutated(content: bytes, choose: random.Random, head: int | None = None) -> bytes:
    """A few changes of any kind, within the first `head` bytes (None: anywhere)."""
    data = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 8))):
        place = choose.randrange(min(len(data), head or len(data)))
        kind = choose.randrange(7)
        if kind == 0:
            data[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            data[place] = choose.choice((0, 0xFF, 0x7F, 0x80, choose.randrange(256)))
        elif kind == 2:
            del data[place : place + choose.choice((1, 4, 100))]
        elif kind == 3:
            data[place:place] = choose.choice(_TEXT)
        elif kind == 4:
            text = choose.choice(_TEXT)
            data[place : place + len(text)] = text
        elif kind == 5:
            form = choose.choice(["<I", "<Q", "<H"])
            number = choose.choice(_LENGTHS) % (1 << 8 * struct.calcsize(form))
            data[place : place + struct.calcsize(form)] = struct.pack(form, number)
        else:
            other = choose.randrange(len(data))
            data[place : place + 8], data[other : other + 8] = (
                data[other : other + 8],
                data[place : place + 8],
            )
        if not data:
            break
    return bytes(data if choose.random() < 0.9 else data[: choose.randrange(len(data) + 1)])


_VALUES = (
    None,
    True,
    0,
    -1,
    1e308,
    10**30,
    2**31,
    2**63,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    ["x"],
    0.5,
)


def mutated_json(content: bytes, choose: random.Random) -> bytes:
    """A JSON text with a few values replaced, left out, repeated or exchanged."""
    document = [json.loads(content)]
    for _ in range(choose.choice((1, 1, 2, 4))):
        holder, key = _place(document, choose)
        kind = choose.randrange(5)
        if kind == 0 and holder is not document:
            del holder[key]
        elif kind == 1:
            other_holder, other_key = _place(document, choose)
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif kind == 2 and isinstance(holder, list) and holder is not document:
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == 3 and isinstance(holder, dict):
            holder[choose.choice(("x", "", key + " "))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(choose.choice(_VALUES))
    return json.dumps(document[0]).encode()


def _place(document: list, choose: random.Random) -> tuple[Any, Any]:
    """A list or dict and a place in it; those further out are as likely as all within them."""
    holder: Any = document
    while True:
        key = choose.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        inner = holder[key]
        if not isinstance(inner, dict | list) or not inner or choose.random() < 0.1:
            return holder, key
        holder = inner


def _framed(*operations: bytes) -> bytes:
    return b"\x80\x04" + b"".join(operations) + b"."


def _named(module: str, name: str) -> bytes:
    """A global of protocol 4."""
    texts = (b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"".join(texts) + b"\x93"


def named(value: str | bytes) -> str:
    """A test's name from the name of its file, without the file's content."""
    return value if isinstance(value, str) else "content"


def hostile_pickles() -> Iterator[tuple[str, bytes]]:
    """Pickles that ask for gigabytes, never end, or build what they should not."""
    torch_metadata = "torch.distributed.checkpoint.metadata"
    for name, code in (("bytes", b"B"), ("text", b"X")):
        yield f"{name} of 4 GB", _framed(code, struct.pack("<I", 2**32 - 1))
    for name, code in (("bytes", b"\x8e"), ("text", b"\x8d"), ("bytearray", b"\x96")):
        yield f"{name} of 1 TB", _framed(code, struct.pack("<Q", 2**40))
    yield "a frame of 1 TB", _framed(b"\x95", struct.pack("<Q", 2**40))
    yield "a number of 2 GB", _framed(b"\x8b", struct.pack("<i", 2**31 - 1))
    yield "a memo of 4 G entries", _framed(b"N", b"r", struct.pack("<I", 2**32 - 1), b"}")
    yield "a memo entry by text", _framed(b"Np999999999999\n}")
    yield "a number by text", _framed(b"I" + b"9" * 100_000 + b"\n")
    yield "references that unfold", _framed(_unfolding(60))
    yield "a key whose hash takes years", _framed(b"}", _unfolding_tuple(60), b"N", b"s")
    yield "a million marks", _framed(b"(" * 1_000_000)
    yield "a list in itself", _framed(b"]\x94h\x00a")
    yield "100,000 lists in each other", _framed(b"]" * 100_000 + b"a" * 99_999)
    for module, name, arguments in (
        ("builtins", "bytearray", b"J" + struct.pack("<i", 2**31 - 1) + b"\x85"),
        ("builtins", "bytes", b"J" + struct.pack("<i", 2**31 - 1) + b"\x85"),
        ("builtins", "set", b"])\x86"),
        ("builtins", "eval", b"\x8c\x01x\x85"),
        ("os", "system", b"\x8c\x04true\x85"),
        ("operator", "mul", b"]J" + struct.pack("<i", 2**31 - 1) + b"\x86"),
        ("torch", "empty", b"\x8a\x05\x00\x00\x00\x00\x10\x85\x85"),
        ("torch", "Tensor", b"\x8a\x05\x00\x00\x00\x00\x10\x85"),
        ("torch._utils", "_rebuild_meta_tensor_no_storage", b")"),
    ):
        yield f"a call of {module}.{name}", _framed(_named(module, name), arguments, b"R")
    for owner in ("WriteItemType", "_MEM_FORMAT_ENCODING", "Metadata"):
        module = torch_metadata if owner != "WriteItemType" else torch_metadata[:-8] + "planner"
        target = _named(module, owner)
        yield (
            f"attributes of the class {owner}",
            _framed(target, b"}\x8c\x08__name__\x8c\x14_MEM_FORMAT_ENCODINGsb"),
        )
        yield (
            f"slots of the class {owner}",
            _framed(target, b"N}\x8c\x0c__setstate__", target, b"s\x86b"),
        )
        yield (
            f"__subclasses__ of {owner}",
            _framed(_named("builtins", "getattr"), target, b"\x8c\x0e__subclasses__\x86R"),
        )
    metadata = _named(torch_metadata, "Metadata")
    yield "an object without content", _framed(metadata, b")\x81")
    yield "an object filled twice", _framed(metadata, b")\x81}b}b")
    yield "an unknown field", _framed(metadata, b")\x81}\x8c\x09__class__Nsb")


def _unfolding(depth: int) -> bytes:
    """A list of two references to a list of two references ..."""
    inner = (b"](h" + bytes([i]) + b"h" + bytes([i]) + b"e\x94" for i in range(depth))
    return b"]\x94" + b"".join(inner)


def _unfolding_tuple(depth: int) -> bytes:
    return b")\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(depth))


def sound_archive() -> bytes:
    """What torch.save writes of a few values."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(6.0).reshape(2, 3), "b": [1, 2.5, "x", None], "c": True}, stream)
    return stream.getvalue()


def rewritten(archive: bytes, changes: dict[str, bytes], *, compress: bool = False) -> bytes:
    """An archive with some members replaced (by the ends of their names) or added."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(stream, "w", kind) as new:
        for name in old.namelist():
            content = next((c for end, c in changes.items() if name.endswith(end)), old.read(name))
            new.writestr(name, content)
    return stream.getvalue()


def _tensor_pickle(shape: tuple, strides: tuple, count: int = 6, offset: int = 0) -> bytes:
    """data.pkl of one float32 tensor over the storage "0"."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), offset, shape, strides, False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(Tensor())
    return stream.getvalue()


def hostile_archives() -> Iterator[tuple[str, bytes]]:
    """Files of torch.save that unpack to more than they are, or describe what they do not hold."""
    sound = sound_archive()
    yield "compressed zeros", rewritten(sound, {"data/0": bytes(2**28)}, compress=True)
    for name, pickled in (
        ("a tensor of 2^60 numbers", _tensor_pickle((2**60,), (1,))),
        ("one number 2^40 times", _tensor_pickle((2**40,), (0,))),
        ("a negative size", _tensor_pickle((-1,), (1,))),
        ("a negative offset", _tensor_pickle((2,), (1,), offset=-1)),
        ("an offset behind its end", _tensor_pickle((6,), (1,), offset=1)),
        ("strides behind its end", _tensor_pickle((2, 3), (4, 1))),
        ("a storage of 2^40 numbers", _tensor_pickle((6,), (1,), count=2**40)),
        ("a thousand dimensions", _tensor_pickle((1,) * 1000, (1,) * 1000)),
    ):
        yield name, rewritten(sound, {"data.pkl": pickled})
    for name, pickled in hostile_pickles():
        yield name, rewritten(sound, {"data.pkl": pickled})
    yield "no archive", pickle.dumps({"a": 1})
    yield "something before it", b"x" * 100 + sound
    yield "something behind it", sound + b"x"
    yield "two archives", sound + sound_archive()


HOSTILE_JSON: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "a million lists": b"[" * 1_000_000,
    "a million objects": b'{"a":' * 1_000_000,
    "a number of 100,000 digits": b'{"num_layers": ' + b"9" * 100_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "a list": b"[]",
    "null": b"null",
    "a text": b'"x"',
}

HOSTILE_YAML: dict[str, bytes] = {
    "not UTF-8": b"seed: \xff",
    "unfolding aliases": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 121)),
    "an alias of itself": b"seed: &a [*a]",
    "a merge": b"a: &a {b: 1}\nc:\n  <<: *a\n",
    "100,000 lists": b"seed: " + b"[" * 100_000,
    "100,000 block lists": b"seed:\n" + b"- " * 100_000,
    "100,000 mappings": b"{seed: " * 100_000,
    "100,000 keys of keys": b"? " * 100_000,
    "a number of 10,000 digits": b"seed: " + b"9" * 10_000,
    "a hexadecimal of 10,000 digits": b"seed: 0x" + b"f" * 10_000,
    "a binary of 10,000 digits": b"seed: 0b" + b"1" * 10_000,
    "numbers of 10,000 digits in a list": b"data_path: [0x" + b"f" * 10_000 + b"]",
    "a sexagesimal number": b"seed: 1" + b":59" * 10_000,
    "a 13th month": b"seed: 2024-13-01",
    "a 31st of February": b"tensorboard_dir: 2024-02-31",
    "an hour 99": b"seed: 2024-02-01 99:00:00",
    "Python": b"seed: !!python/object/apply:os.system [true]",
    "no base 64": b"seed: !!binary '='",
    "a wrong number": b"seed: !!int x",
    "a wrong float": b"lr: !!float x",
    "a wrong time": b"seed: !!timestamp x",
    "a set": b"seed: !!set {a, b}",
    "a list as a key": b"? [a, b]\n: 1",
    "two documents": b"seed: 1\n---\nseed: 2",
    "control characters": b"seed: \x00\x01",
    "a megabyte": b"# " + b"x" * 2**20,
}


def safetensors_file(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    """A file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def hostile_safetensors() -> Iterator[tuple[str, bytes]]:
    """Weight files whose header is not that of their numbers."""

    def one(**changes: object) -> dict:
        return {"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}

    yield "nothing", b""
    yield "a header of 2^63 bytes", safetensors_file(one(), length=2**63)
    yield "a header of 99 MB", safetensors_file(one(), length=99_000_000)
    yield "a shape of 2^60", safetensors_file(one(shape=[2**60]))
    yield "a shape that overflows", safetensors_file(one(shape=[2**32, 2**32, 2**32]))
    yield "a shape of 2^64", safetensors_file(one(shape=[2**64]))
    yield "a negative shape", safetensors_file(one(shape=[-6]))
    yield "an end behind the file", safetensors_file(one(data_offsets=[0, 2**40], shape=[2**38]))
    yield "an end before its beginning", safetensors_file(one(data_offsets=[24, 0]))
    yield "a hole", safetensors_file(one(data_offsets=[4, 28]), bytes(28))
    yield "more numbers than are listed", safetensors_file(one(), bytes(32))
    yield "an unknown type", safetensors_file(one(dtype="F33"))
    yield "a type that is no text", safetensors_file(one(dtype=7))
    yield "lists in lists", safetensors_file(b"[" * 100_000)
    yield "no object", safetensors_file(b"[]")
    yield "not UTF-8", safetensors_file(b'{"\xff": 1}')
