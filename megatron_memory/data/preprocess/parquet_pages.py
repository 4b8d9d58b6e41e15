"""How large the pages of a Parquet column are, before any is decompressed.

A page is read whole, and one of a few bytes can hold gigabytes. pyarrow does not show the pages'
headers, so they are read here: structs in Thrift's compact protocol, of which two numbers count
(parquet.thrift, PageHeader).
"""

from typing import Any, BinaryIO

_UNCOMPRESSED_SIZE, _COMPRESSED_SIZE = 2, 3
_FIRST_WINDOW, _LARGEST_WINDOW = 1 << 12, 1 << 20
_DEEPEST = 16

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_NUMBERS = (_I16, _I32, _I64)


def largest_page(stream: BinaryIO, column: Any) -> int:
    """Bytes of the largest page of a column of a row group, decompressed.

    Args:
        stream: of the file.
        column: pyarrow's metadata of the column.

    Raises:
        ValueError: a header is damaged.
    """
    offset = column.data_page_offset
    if column.dictionary_page_offset:
        offset = min(offset, column.dictionary_page_offset)
    end, largest = offset + column.total_compressed_size, 0
    while offset < end:
        fields, length = _header_at(stream, offset)
        uncompressed, compressed = fields.get(_UNCOMPRESSED_SIZE), fields.get(_COMPRESSED_SIZE)
        if uncompressed is None or compressed is None or min(uncompressed, compressed) < 0:
            raise ValueError(f"the page at byte {offset} has no size")
        largest = max(largest, uncompressed)
        offset += length + compressed
    return largest


def _header_at(stream: BinaryIO, offset: int) -> tuple[dict[int, int], int]:
    """The numbers of a page's header by their fields, and its length."""
    for window in (_FIRST_WINDOW, _LARGEST_WINDOW):
        stream.seek(offset)
        header = _Compact(stream.read(window))
        try:
            return header.struct(), header.position
        # It goes on behind the window.
        except IndexError:
            continue
    raise ValueError(f"the header of the page at byte {offset} does not end")


class _Compact:
    """Reads Thrift's compact protocol. IndexError where the data end."""

    def __init__(self, data: bytes):
        self._data = data
        self.position = 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """A struct's numbers by their fields; all else is passed over."""
        if depth > _DEEPEST:
            raise ValueError("a page's header is nested too deep")
        fields: dict[int, int] = {}
        number = 0
        while byte := self._byte():
            kind = byte & 15
            number = number + (byte >> 4) if byte >> 4 else self._zigzag()
            if kind in _NUMBERS:
                fields[number] = self._zigzag()
            elif kind not in (_TRUE, _FALSE):
                self._skip(kind, depth)
        return fields

    def _byte(self) -> int:
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a page's header has a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _advance(self, length: int) -> None:
        self.position += length
        if self.position > len(self._data):
            raise IndexError

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (_TRUE, _FALSE, _BYTE):
            self._advance(1)
        elif kind in _NUMBERS:
            self._varint()
        elif kind == _DOUBLE:
            self._advance(8)
        elif kind == _BINARY:
            self._advance(self._varint())
        elif kind in (_LIST, _SET):
            byte = self._byte()
            size = byte >> 4 if byte >> 4 < 15 else self._varint()
            self._skip_all((byte & 15,), size, depth)
        elif kind == _MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            self._skip_all((kinds >> 4, kinds & 15), size, depth)
        elif kind == _STRUCT:
            self.struct(depth + 1)
        else:
            raise ValueError(f"a page's header has a field of the unknown kind {kind}")

    def _skip_all(self, kinds: tuple[int, ...], size: int, depth: int) -> None:
        if depth > _DEEPEST:
            raise ValueError("a page's header is nested too deep")
        for _ in range(size):
            for kind in kinds:
                self._skip(kind, depth + 1)
