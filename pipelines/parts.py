"""The parts a log comes in: each a directory that `ingest` wrote, the oldest first.

A part is what became known at one time: the whole log at first, then perhaps a day at a time. Three rules make
"append the new part" and "prepare all parts anew" the same thing, byte for byte:

    keys       are given part by part: an item or user of an earlier part has the smaller key
    time       a user's events in a part are all later than the user's events in the parts before it
    sessions   end with their part: the same session name in two parts is two sessions

A late event therefore needs the whole log to be ingested again as one part. Of an item or user that several parts
describe, the newest part's attributes count; what it leaves empty keeps its earlier value.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipelines.forgotten import hidden_users
from recsys.columns import USER_ID
from recsys.errors import DataError
from recsys.files import read_json, sha256_json, whole_directory


@dataclass(frozen=True)
class PartRecord:
    """What a prepared set remembers of a part; times are microseconds UTC, or positions."""

    name: str
    digest: str
    events: int
    first: int
    last: int


@dataclass(frozen=True)
class Part:
    """One directory that `ingest` wrote; `columns` are those of its events, `record` what a set remembers of it.

    `hidden` are users who asked to be forgotten after its events (`pipelines.forgotten`): it gives none of them.
    `named` is the directory that messages name, where this one is a copy.
    """

    directory: Path
    events: pl.LazyFrame
    columns: tuple[str, ...]
    record: PartRecord
    hidden: tuple[str, ...] = ()
    named: Path | None = None

    @property
    def file(self) -> Path:
        """Its events, as messages name them."""
        return (self.named or self.directory) / "events.parquet"

    @property
    def items(self) -> Path:
        """Its item table."""
        return self.directory / "items.parquet"

    def users(self) -> pl.DataFrame:
        """Return its user table."""
        return pl.read_parquet(self.directory / "users.parquet").filter(~pl.col(USER_ID).is_in(self.hidden))


def open_part(directory: Path) -> Part:
    """Open what `ingest` wrote; raises `DataError` naming the file that is missing or damaged."""
    columns, *_ = [_columns(directory / f"{name}.parquet") for name in ("events", "items", "users")]
    summary = read_json(directory / "ingest.json")
    hidden = hidden_users(directory)
    events = pl.scan_parquet(directory / "events.parquet")
    if hidden:
        events = events.filter(~pl.col(USER_ID).is_in(hidden))
    record = PartRecord(
        name=str(summary["source"]),
        digest=str(summary["digest"]),
        events=int(summary["events"]),
        first=int(summary["first_time"]),
        last=int(summary["last_time"]),
    )
    return Part(directory, events, columns, record, hidden)


def _columns(path: Path) -> tuple[str, ...]:
    if not path.exists():
        raise DataError(f"{path}: no such file; run `recsys ingest` first")
    try:
        return tuple(pl.scan_parquet(path).collect_schema().names())
    except pl.exceptions.PolarsError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: damaged or cut short ({reason}); run `recsys ingest` again") from None


def source_of(records: Sequence[PartRecord]) -> dict[str, str]:
    """Return one name and one digest for a log in parts; those of the part itself if there is one only."""
    if len(records) == 1:
        return {"name": records[0].name, "digest": records[0].digest}
    name = f"{records[0].name}, and {len(records) - 1} more part{'s' if len(records) > 2 else ''}"
    return {"name": name, "digest": sha256_json([record.digest for record in records])}


def keep_part(directory: Path, folder: Path) -> Path:
    """Copy a part into `folder` under the next number unless its like is there already; give where it lies.

    Raises:
        DataError: another process has written a part under that number meanwhile.
    """
    wanted = open_part(directory).record.digest
    kept = sorted(folder.glob("[0-9]*")) if folder.exists() else []
    for other in kept:
        if open_part(other).record.digest == wanted:
            return other
    highest = max((int(other.name) for other in kept if other.name.isdigit()), default=0)
    place = folder / f"{highest + 1:04}"
    with whole_directory(place) as temporary:
        shutil.copytree(directory, temporary, dirs_exist_ok=True)
        if place.exists():
            raise DataError(f"{place}: written by another process meanwhile; run `recsys prepare --add` again")
    return place
