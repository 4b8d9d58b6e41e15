"""The text of a file, plain or compressed."""

import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from megatron_memory.data.preprocess.inputs import STANDARD_INPUT, ZSTD_ENDINGS
from megatron_memory.optional import require

# Compressed bytes decompressed in one go. Zstandard can make 128 KiB of four bytes, so that a file
# made for it needs 256 MiB here; text needs a few times as much as this.
_ZSTD_CHUNK = 8192


@contextlib.contextmanager
def open_text(path: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The text of a file and the file itself, the same stream where nothing is compressed.

    Raises:
        ConfigurationError: a package that its compression needs is not installed.
        EOFError, OSError: on reading: it is damaged or cut off.
    """
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer, sys.stdin.buffer
        return
    with open(path, "rb") as raw:
        if path.endswith(".gz"):
            yield cast(BinaryIO, _GzipReader(fileobj=raw)), raw
        elif path.endswith(ZSTD_ENDINGS):
            yield cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 18)), raw
        else:
            yield raw, raw


class _GzipReader(gzip.GzipFile):
    """A gzip.GzipFile whose every complaint is an OSError or EOFError."""

    def read(self, size: int | None = -1) -> bytes:
        try:
            return super().read(size)
        except zlib.error as error:
            raise OSError(str(error)) from error


class _ZstdReader(io.RawIOBase):
    """Decompresses all frames of a file. zstandard's own reader takes a file that is cut off for
    one that ends there."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        # 2^31: whatever `zstd --long` can write.
        self._decompressor = require("zstandard").ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._compressed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            if not self._more():
                return 0
        size = min(len(buffer), len(self._text))
        buffer[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def _more(self) -> bool:
        """Decompress the next piece; False at the end of the file."""
        if not self._compressed:
            self._compressed = self._raw.read(_ZSTD_CHUNK)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the file ends inside a frame")
            return False
        frame = self._frame or self._decompressor.decompressobj()
        try:
            self._text = memoryview(frame.decompress(self._compressed))
        except require("zstandard").ZstdError as error:
            raise OSError(str(error)) from error
        self._frame = None if frame.eof else frame
        self._compressed = frame.unused_data if frame.eof else b""
        return True
