"""Text of local files: unpacked, decoded, with the line at which reading failed and the encoding that would work."""

from __future__ import annotations

import codecs
import gzip
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NoReturn, cast

from finetune.errors import InputError
from finetune.utils.format import first_line

CHUNK_BYTES = 1 << 20
MOST_ROW_BYTES = 1 << 27  # of one row: of JSON a value, of CSV a field; reading one takes some times that in memory
MOST_GROWTH, UNPACKED_BYTES = 100, 1 << 23  # of a packed file, and from where it counts: rows grow tenfold or so
GUESS_BYTES = 1 << 22  # of a file, to guess its encoding by; the guess is then tried on the whole file
FOREIGN_LETTERS = 0.3  # a western text has a smaller share of letters beyond ASCII
UNREADABLE = (EOFError, OSError, zlib.error)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path, "rb") as stream:
            yield cast("BinaryIO", stream)
    elif path.suffix.lower() == ".zst":
        zstd = _zstd()
        try:
            with zstd.ZstdFile(path) as stream:  # a file that ends within a frame raises EOFError
                yield stream
        except zstd.ZstdError as error:
            raise EOFError(f"a frame is damaged: {error}") from error
    else:
        with path.open("rb") as file:
            yield file


def _zstd() -> ModuleType:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        try:
            from backports import zstd
        except ImportError:
            raise InputError("reading .zst files needs a package: pip install backports.zstd") from None
    module: ModuleType = zstd
    return module


def lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a text file (UTF-8 if no encoding is given) with their numbers; a byte order mark is left out."""
    open_line: list[str] = []  # pieces of a line that has not ended
    number, length = 1, 0
    for text in chunks(path, encoding):
        first, *later = text.split("\n")
        open_line.append(first)
        for following in later:
            yield number, "".join([*open_line, "\n"])
            open_line, length, number = [following], 0, number + 1
        length += len(open_line[-1])
        if length > MOST_ROW_BYTES:
            refuse(path, number, "a line without end", f"at most {MOST_ROW_BYTES >> 20} MB a row")
    if last := "".join(open_line):
        yield number, last


def chunks(path: Path, encoding: str | None = None) -> Iterator[str]:
    """The text of a file in pieces, none of them empty."""
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")()
    line, first = 1, True
    try:
        with opened(path) as stream:
            for raw in _pieces(path, stream):
                text = decoder.decode(_without_mark(path, raw) if first and encoding is None else raw)
                text = text.removeprefix("\ufeff") if first else text
                first = False
                if text:
                    yield text
                line += text.count("\n")
            decoder.decode(b"", final=True)
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError):
            line += error.object[: error.start].count(b"\n")
        _refuse_encoding(path, line, error, encoding)
    except UNREADABLE as error:
        refuse(path, line, f"a file that is damaged or cut off ({first_line(error)})", "a whole file")


def _pieces(path: Path, stream: BinaryIO) -> Iterator[bytes]:
    """The bytes of a stream, 1 MB at a time. Raises InputError for a packed file that grows as no rows do."""
    packed = path.suffix.lower() in (".gz", ".zst")
    most = max(UNPACKED_BYTES, MOST_GROWTH * path.stat().st_size) if packed else float("inf")
    taken = 0
    while raw := stream.read(CHUNK_BYTES):
        taken += len(raw)
        if taken > most:
            raise InputError(
                f"{path} unpacks to more than {MOST_GROWTH} times its size, as no rows do; unpack it yourself if it is "
                "right"
            )
        yield raw


def _without_mark(path: Path, start: bytes) -> bytes:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        refuse(path, 1, "UTF-16 text", f"UTF-8 text; {_advice(path)}")
    if b"\0" in start[:2]:  # no text begins so, but one in UTF-16 does where its mark is missing
        refuse(path, 1, "a zero byte, as in UTF-16 text", f"UTF-8 text; {_advice(path)}")
    return start.removeprefix(codecs.BOM_UTF8)


def _refuse_encoding(path: Path, line: int, error: UnicodeError, encoding: str | None) -> NoReturn:
    problem = first_line(error)
    if isinstance(error, UnicodeDecodeError):
        byte = f"the byte 0x{error.object[error.start]:02x}"
        place = error.start - 1 - error.object.rfind(b"\n", 0, error.start)
        problem = byte if encoding is not None else f"{byte} at byte {place}"
    refuse(path, line, problem, f"{encoding or 'UTF-8'} text; {_advice(path, encoding)}")


def _advice(path: Path, tried: str | None = None) -> str:
    works = encoding_of(path)
    if works is None:
        return "most of the file is UTF-8, so fix that place or save the file as UTF-8"
    if works == tried:
        return "save the file as UTF-8"
    if works == "utf-8":
        return "it reads as UTF-8: leave encoding out"
    return f"it reads as {works}: set encoding: {works} on the source, or save the file as UTF-8"


def encoding_of(path: Path) -> str | None:
    """The name of an encoding by which the whole file reads as text; None for UTF-8 text with damaged places."""
    with opened(path) as stream:
        sample = stream.read(GUESS_BYTES)
    if sample.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    zeros = (sample[0:2000:2].count(0), sample[1:2000:2].count(0))
    if max(zeros) > len(sample[:2000]) // 5:
        return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
    valid = sample.decode("utf-8", "ignore")
    foreign = sum(1 for c in valid if ord(c) > 127)
    damaged = len(sample) - len(valid.encode())
    if damaged <= 3 and _decodes(path, "utf-8"):  # a character may be cut at the end of the sample
        return "utf-8"
    if foreign > damaged:
        return None
    return next((name for name in _guesses(sample) if _decodes(path, name)), "latin-1")


def _guesses(sample: bytes) -> Iterator[str]:
    try:
        text = sample.decode("cp1252")
    except UnicodeDecodeError:
        text = ""
    letters = [c for c in text if c.isalpha()]
    # Cyrillic, Greek or Chinese text read as cp1252 is nearly all accented letters, and letters beside signs.
    if text and sum(ord(c) > 127 for c in letters) <= FOREIGN_LETTERS * len(letters):
        yield "cp1252"
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        pass
    else:
        best = from_bytes(sample).best()
        if best is not None:
            yield best.encoding.replace("_", "-")
    yield "cp1252"


def _decodes(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with opened(path) as stream:
            while raw := stream.read(CHUNK_BYTES):
                decoder.decode(raw)
            decoder.decode(b"", final=True)
    except (UnicodeError, *UNREADABLE):
        return False
    return True


def refuse(path: Path, line: int, actual: str, allowed: str) -> NoReturn:
    """Raise the InputError of a file that cannot be read on from `line`."""
    raise InputError(f"{path}, line {line}: found {actual}; allowed is {allowed}")
