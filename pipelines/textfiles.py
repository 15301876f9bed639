"""What must hold of a text file before anything parses it: UTF-8, lines of bounded length, quotes that pair.

A CSV parser meets a missing quote by swallowing rows until the next one, so quotes are checked first, over bytes and in
bounded memory: an opening one stands at the start of a field, a closing one at its end, one inside is doubled (RFC
4180). A violation is reported where the quote was opened, not where the parser would have noticed. Files packed by gzip
(`.gz`) are unpacked as they are read.
"""

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from recsys.errors import DataError

CHUNK = 1 << 22
MAX_LINE = 1 << 24
"""bytes; a longer line is no row of a log"""
PACKED = ".gz"
"""suffix of files packed by gzip, behind that of their kind: log.csv.gz"""
SEPARATORS = ",\t;|"
_BOM = codecs.BOM_UTF8
_QUOTE, _NEWLINE, _RETURN = 0x22, 0x0A, 0x0D
_EXCERPT = 40


@dataclass(frozen=True)
class Header:
    """First line of a CSV file: the columns' names, and what separates them."""

    names: tuple[str, ...]
    separator: str


def open_bytes(path: Path) -> BinaryIO:
    """Open a text file, packed by gzip or not, to read its bytes."""
    return cast("BinaryIO", gzip.open(path)) if path.suffix.lower() == PACKED else path.open("rb")


def read_header(path: Path, max_line: int = MAX_LINE) -> Header:
    """Read a CSV file's first line; the separator is the one of comma, tab, semicolon and bar it has most of.

    Raises:
        DataError: the file is missing or empty, the line is too long or not UTF-8, or a name stands twice.
    """
    try:
        with open_bytes(path) as file:
            line = file.readline(max_line + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not line.strip():
        raise DataError(f"{path}: empty; expected a first line with the names of the columns")
    if len(line) > max_line:
        raise _too_long(path, 1, max_line)
    try:
        text = line.removeprefix(_BOM).decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, 1, "the names of the columns", line[error.start : error.start + 1], line) from None
    outside = "".join(text.split('"')[::2])
    separator = max(SEPARATORS, key=outside.count)
    try:
        names = next(csv.reader([text], delimiter=separator, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}, line 1: the names of the columns cannot be read ({error})") from None
    names = [name or f"column_{place}" for place, name in enumerate(names, 1)]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}, line 1: column {name!r} stands {names.count(name)} times; expected one name each")
    return Header(tuple(names), separator)


def check_text(path: Path, header: Header | None = None, max_line: int = MAX_LINE) -> None:
    """Refuse a text file that is not UTF-8, has a line of more than `max_line` bytes, or quotes that do not pair.

    Args:
        path: the file.
        header: of a CSV file, whose quotes are then checked; None for JSON Lines.
        max_line: bytes.

    Raises:
        DataError: naming file, line, column, what was found and what is wanted.

    Cost: one streaming pass; memory does not depend on the file, nor on its longest line.
    """
    lines, quotes = _Lines(path, max_line), _Quotes(path, header) if header else None
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    for offset, chunk in _chunks(path):
        size = offset + len(chunk)
        lines.feed(offset, chunk)
        pending = decoder.getstate()[0]
        try:
            if pending or not chunk.isascii():
                decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _undecodable(path, offset - len(pending) + error.start, header) from None
        if quotes:
            quotes.feed(offset, chunk)
    if pending := decoder.getstate()[0]:
        raise _undecodable(path, size - len(pending), header)
    if quotes:
        quotes.finish(size)


class _Lines:
    """Finds a line that is too long as soon as it is."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.before, self.start = 0, 0  # complete lines so far; where the one at hand starts

    def feed(self, offset: int, chunk: bytes) -> None:
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE) + offset
        bounds = np.concatenate([[self.start - 1], ends, [offset + len(chunk)]])
        long = np.flatnonzero(np.diff(bounds) - 1 > self.limit)
        if long.size:
            raise _too_long(self.path, self.before + int(long[0]) + 1, self.limit)
        self.before += len(ends)
        if len(ends):
            self.start = int(ends[-1]) + 1


class _Quotes:
    """Checks that quotes open where a field begins and close where it ends."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.edges = np.array([ord(header.separator), _NEWLINE, _RETURN, _QUOTE], np.uint8)
        self.carry = b"\n"  # what stands before the file counts as the end of a line
        self.seen, self.opened = 0, 0  # quotes so far; where the last opening one stands

    def feed(self, offset: int, chunk: bytes) -> None:
        if _QUOTE not in chunk and _QUOTE not in self.carry:
            self.carry = (self.carry + chunk)[-2:]
            return
        start = offset - len(self.carry)
        self._check(start, self.carry + chunk)
        self.carry = (self.carry + chunk)[-2:]

    def finish(self, size: int) -> None:
        self._check(size - len(self.carry), self.carry + b"\n")
        if self.seen % 2:
            raise self._unclosed("the file ends before the next quote")

    def _check(self, start: int, data: bytes) -> None:
        """Check the quotes of all bytes that have a neighbour on both sides; the last one waits for the next call."""
        values = np.frombuffer(data, np.uint8)
        at = np.flatnonzero(values[1:-1] == _QUOTE) + 1
        if not at.size:
            return
        opening = (self.seen + np.arange(len(at))) % 2 == 0
        beside: NDArray[np.uint8] = np.where(opening, values[at - 1], values[at + 1])
        wrong = np.flatnonzero(~np.isin(beside, self.edges))
        first = int(wrong[0]) if wrong.size else len(at)
        # The second quote of a doubled one opens nothing: its field began earlier.
        opened = at[:first][opening[:first] & (beside[:first] != _QUOTE)]
        if opened.size:
            self.opened = start + int(opened[-1])
        if wrong.size:
            place = start + int(at[first])
            if opening[first]:
                line, column, excerpt = _locate(self.path, place, self.header)
                raise DataError(
                    f"{self.path}, line {line}{column}: a quote inside a field that does not begin with one, near "
                    f'{excerpt!r}; expected the whole field in quotes, the inner one doubled: "5"" pipe"'
                )
            line, _, excerpt = _locate(self.path, place, self.header)
            raise self._unclosed(f"the next quote, in line {line}, stands in the middle of {excerpt!r}")
        self.seen += len(at)

    def _unclosed(self, why: str) -> DataError:
        line, column, excerpt = _locate(self.path, self.opened, self.header)
        return DataError(
            f"{self.path}, line {line}{column}: the quote opened at {excerpt!r} is not closed: {why}; expected a "
            "closing quote at the end of the field"
        )


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (place in the file, bytes) without the byte order mark."""
    try:
        with open_bytes(path) as file:
            offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield offset, chunk
                offset += len(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); expected a whole file packed by gzip") from None


def _locate(path: Path, place: int, header: Header | None) -> tuple[int, str, str]:
    """Return the line of a byte counted from 1, `, column 'name'` where there are columns, a few characters there."""
    line, start = 1, 0
    for offset, chunk in _chunks(path):
        part = chunk[: max(0, place - offset)]
        line += part.count(b"\n")
        if (newest := part.rfind(b"\n")) >= 0:
            start = offset + newest + 1
        if offset + len(chunk) > place:
            break
    with open_bytes(path) as file:
        file.seek(start)
        prefix = file.read(min(place - start, MAX_LINE))
        excerpt = file.read(_EXCERPT).split(b"\n")[0].decode(errors="replace").rstrip("\r")
    if header is None:
        return line, "", excerpt
    index = sum(part.count(header.separator.encode()) for part in prefix.split(b'"')[::2])
    name = repr(header.names[index]) if index < len(header.names) else f"number {index + 1}"
    return line, f", column {name}", excerpt


def _undecodable(path: Path, place: int, header: Header | None) -> DataError:
    line, column, _ = _locate(path, place, header)
    with open_bytes(path) as file:
        file.seek(max(0, place - _EXCERPT // 2))
        around = file.read(_EXCERPT)
        file.seek(place)
        byte = file.read(1)
    return _not_utf8(path, line, column.removeprefix(", "), byte, around)


def _not_utf8(path: Path, line: int, where: str, byte: bytes, around: bytes) -> DataError:
    """Name the byte, and how its surroundings read as Latin-1: what such a file mostly is."""
    if line == 1 and byte in (b"\xff", b"\xfe"):  # its byte order mark
        return DataError(
            f"{path}, line 1: begins as UTF-16 (byte 0x{byte.hex()}); expected UTF-8, e.g. iconv -f utf-16 -t utf-8 "
            f"{path.name} > utf8_{path.name}"
        )
    text = around.decode("latin-1").splitlines()
    words = next((part for part in text if byte.decode("latin-1") in part), "")[:_EXCERPT]
    return DataError(
        f"{path}, line {line}{', ' if where else ''}{where}: byte 0x{byte.hex()} is not UTF-8 (as Latin-1 it reads "
        f"{words!r}); expected UTF-8, e.g. iconv -f latin1 -t utf-8 {path.name} > utf8_{path.name}"
    )


def _too_long(path: Path, line: int, limit: int) -> DataError:
    return DataError(
        f"{path}, line {line}: longer than {limit:,} bytes; expected one row per line (is a line end missing, or is "
        "this not a text file?)"
    )
