"""Zstandard files as a stream that notices when they are cut off."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import BinaryIO, Protocol

from finetune.errors import InputError

CHUNK_BYTES = 1 << 17
PIECE_BYTES = 1 << 11  # given to the decompressor at once: it may make 32,768 times as much of it, 64 MB


class _Decompressor(Protocol):
    def decompress(self, data: bytes, /) -> bytes: ...
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...


def _zstd() -> tuple[Callable[[], _Decompressor], type[Exception]]:
    """What makes a decompressor of one frame, and what it raises."""
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor, ZstdError

        return ZstdDecompressor, ZstdError
    try:
        import zstandard
    except ImportError:
        raise InputError("reading .zst files needs the package zstandard: pip install zstandard") from None
    return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError


class ZstdStream(io.RawIOBase):
    """Zstandard frames as one stream; unlike the packages' own readers, a file that ends within a frame is an error."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._new, self._error = _zstd()
        self._frame: _Decompressor | None = None
        self._packed = memoryview(b"")
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        """It reads."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer`; 0 at the end. Raises EOFError where a frame is damaged or cut off."""
        while not self._plain:
            self._packed = self._packed or memoryview(self._file.read(CHUNK_BYTES))
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the last frame is cut off")
                return 0
            frame = self._frame = self._frame or self._new()
            piece, self._packed = self._packed[:PIECE_BYTES], self._packed[PIECE_BYTES:]
            try:
                self._plain = memoryview(frame.decompress(bytes(piece)))
            except self._error as error:
                raise EOFError(f"a frame is damaged: {error}") from error
            if frame.eof:
                self._packed = memoryview(frame.unused_data + bytes(self._packed))
            if frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._plain))
        buffer[:size], self._plain = self._plain[:size], self._plain[size:]
        return size
