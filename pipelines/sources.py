"""Files of any of three kinds as rows with a number: CSV (comma, tab, semicolon or bar), Parquet, JSON Lines.

CSV and JSON Lines may be packed by gzip (`log.csv.gz`).

Text formats give every column as text, so that one odd value is one bad row and not a file that cannot be read; what a
value means is decided in `pipelines.fields`. Row numbers count from 1, a CSV's header not counted.
"""

import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from pipelines.derived import ENTRY, derive, with_derived
from pipelines.textfiles import MAX_LINE, PACKED, Header, check_text, open_bytes, read_header
from recsys.errors import DataError

ROW = "_row"
BROKEN = "_broken"
"""true where a line is no row of the table at all: more fields than columns, or not a JSON object"""
WHOLE_ROW = {"csv": "no more fields than there are columns", "jsonl": "one JSON object", "parquet": "a row"}
"""what a line has to be, by the kind of file"""
_LINE, _OBJECT = "_line", "_object"
_EXTRA = "_extra"
_SAMPLED_LINES = 1000

Kind = Literal["csv", "parquet", "jsonl"]
KINDS: dict[str, Kind] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}


@dataclass(frozen=True)
class Table:
    """One file that was looked at and not read yet; the columns of text formats are text.

    Attributes:
        path: the file.
        kind: its format.
        columns: names and types. A JSON Lines file may have more: these stand in its first 1,000 lines. What stands in
            an object inside an object has the names of both with a dot between them: `user.id`.
        header: of a CSV file.
        trusted: whether a JSON Lines file is read at once, several times as fast, and fails as a whole at one wrong
            line; else every line stands alone.
    """

    path: Path
    kind: Kind
    columns: dict[str, pl.DataType]
    header: Header | None = None
    trusted: bool = False
    paths: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """of the columns of JSON Lines: the keys that lead there"""

    def require(self, name: str, meaning: str) -> pl.DataType:
        """Return the type of a column, or of one that is made of others (`pipelines.derived`).

        Raises:
            DataError: there is none of that name; the message names what it was for, the nearest, and all there are.
        """
        if name in self.columns:
            return self.columns[name]
        if (made := derive(name, self.columns, self.path)) is not None:
            return made.kind
        nearest = difflib.get_close_matches(name, self.columns, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise DataError(
            f"{self.path}: no column {name!r} ({meaning}){hint}; found {', '.join(self.columns) or 'no column'}"
        )

    def rows(self, names: Sequence[str]) -> pl.LazyFrame:
        """Return the named columns with `ROW` (uint64) and `BROKEN` (bool) beside them, in the file's order.

        Where a column has entries (`pipelines.derived`) each of them is a row; those of one row share its number and
        have one of their own, `ENTRY`.
        """
        wanted = list(dict.fromkeys(names))
        made = {name: derive(name, self.columns, self.path) for name in wanted if name not in self.columns}
        derived = {name: one for name, one in made.items() if one is not None}
        there = [name for name in wanted if name not in derived]
        frame = self._plain([*there, *(need for one in derived.values() for need in one.needs)])
        if not derived:
            return frame
        entry = [ENTRY] if any(one.entries for one in derived.values()) else []
        return with_derived(frame, derived, pl.col(BROKEN)).select(ROW, BROKEN, *entry, *wanted)

    def _plain(self, names: Sequence[str]) -> pl.LazyFrame:
        """Return columns that the file has."""
        wanted = list(dict.fromkeys(names))
        if self.kind == "parquet":
            frame = pl.scan_parquet(self.path, row_index_name=ROW, row_index_offset=1, glob=False)
            columns, broken = [pl.col(name) for name in wanted], pl.lit(False)
        elif self.kind == "csv":
            frame, columns, broken = self._csv(), [pl.col(name) for name in wanted], pl.col(_EXTRA).is_not_null()
        else:
            frame, columns, broken = self._lines(wanted), [pl.col(name) for name in wanted], pl.col(_LINE).is_null()
        return frame.select(pl.col(ROW).cast(pl.UInt64), broken.alias(BROKEN), *columns)

    def _lines(self, names: Sequence[str]) -> pl.LazyFrame:
        frame = pl.scan_lines(self.path, name=_LINE, row_index_name=ROW, row_index_offset=1, glob=False)
        line = pl.col(_LINE).str.strip_chars()
        whole = line.str.starts_with("{") & line.str.ends_with("}")
        if self.trusted and all(len(self._path(name)) == 1 for name in names):
            kind = pl.Struct(dict.fromkeys(names, pl.String()))
            frame = frame.with_columns(pl.when(whole).then(line).alias(_LINE))
            return frame.with_columns(pl.col(_LINE).str.json_decode(kind).alias(_OBJECT)).unnest(_OBJECT)
        whole &= line.str.json_path_match("$").is_not_null()
        frame = frame.with_columns(pl.when(whole).then(line).alias(_LINE))
        return frame.with_columns(
            pl.col(_LINE).str.json_path_match(_json_path(self._path(name))).alias(name) for name in names
        )

    def _path(self, name: str) -> tuple[str, ...]:
        return self.paths.get(name, (name,))

    def _csv(self) -> pl.LazyFrame:
        assert self.header is not None
        names = [*self.header.names, _EXTRA]  # one more than there are: it catches a field too many
        return pl.scan_csv(
            self.path,
            separator=self.header.separator,
            has_header=False,
            skip_lines=1,
            schema=dict.fromkeys(names, pl.String()),
            truncate_ragged_lines=True,
            missing_columns="insert",
            extra_columns="ignore",
            row_index_name=ROW,
            row_index_offset=1,
            glob=False,
        )


def find_files(pattern: str, folder: Path, what: str) -> list[Path]:
    """Return the files a path or glob means, in alphabetical order.

    Args:
        pattern: a path or a glob; `**` goes through folders.
        folder: where a relative one starts.
        what: how messages call them, e.g. `[source] events`.

    Raises:
        DataError: there is none.
    """
    place = folder / Path(pattern).expanduser()
    base = Path(place.anchor)  # empty for a relative place; pathlib's glob takes relative patterns only
    found = [place] if place.is_file() else sorted(base.glob(str(place.relative_to(base))))
    files = [path for path in found if path.is_file()]
    if not files:
        near = difflib.get_close_matches(place.name, _names_in(place.parent), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"{what}: no file {place}{hint}; expected a path or a glob, from the mapping's own folder")
    return files


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def open_table(path: Path, max_line: int = MAX_LINE) -> Table:
    """Look at a file: its kind by its suffix, its columns, and whether a text file can be parsed at all.

    Raises:
        DataError: an unknown suffix, no Parquet file, not UTF-8, quotes that do not pair, a line of more than
            `max_line` bytes, no column. The message names file, line and column.

    Cost: text files are streamed through once, at about the disk's speed.
    """
    packed = path.suffix.lower() == PACKED
    suffix = (path.with_suffix("") if packed else path).suffix
    kind = KINDS.get(suffix.lower())
    if kind is None:
        hint = "; unpack it first" if suffix.lower() in (".zip", ".bz2", ".xz", ".zst", ".tar", ".tgz") else ""
        raise DataError(f"{path}: suffix {suffix!r} is none of {', '.join(KINDS)}{hint}")
    if kind == "parquet":
        if packed:
            raise DataError(f"{path}: Parquet is packed by itself; unpack it first")
        try:
            return Table(path, kind, dict(pl.read_parquet_schema(path)))
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{path}: not a Parquet file ({_first_line(error)})") from None
    if kind == "csv":
        header = read_header(path, max_line)
        check_text(path, header, max_line)
        return Table(path, kind, dict.fromkeys(header.names, pl.String()), header)
    check_text(path, max_line=max_line)
    paths = _keys(path)
    return Table(path, kind, dict.fromkeys(paths, pl.String()), paths=paths)


def _keys(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the columns of the first lines of JSON Lines, and the keys that lead to each."""
    keys: dict[str, tuple[str, ...]] = {}
    number = 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as file:
        for number, line in zip(range(1, _SAMPLED_LINES + 1), file, strict=False):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                row, problem = None, f"{error.msg} at column {error.colno}"
            else:
                problem = f"found {type(row).__name__}"
            if isinstance(row, dict):
                keys |= _flat(row)
            elif number == 1:
                raise DataError(f"{path}, line 1: not a JSON object ({problem}); expected one object per line")
    if not number:
        raise DataError(f"{path}: empty; expected one JSON object per line")
    return keys


def _flat(row: Mapping[str, object], before: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Return the columns of an object and the keys that lead to each; lists are values."""
    found: dict[str, tuple[str, ...]] = {}
    for key, value in row.items():
        path = (*before, key)
        found |= _flat(value, path) if isinstance(value, dict) and value else {".".join(path): path}
    return found


def _json_path(path: Sequence[str]) -> str:
    quoted = (key.replace("\\", "\\\\").replace("'", "\\'") for key in path)
    return "$" + "".join(f"['{key}']" for key in quoted)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
