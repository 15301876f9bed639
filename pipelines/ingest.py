"""Takes a raw log into the system: checked, in canonical columns and types, as three Parquet files.

    events.parquet    user_id, item_id, timestamp; action, value, session_id, event_id where the log has them
    items.parquet     item_id, text, the catalogue's columns; one row per item
    users.parquet     user_id, the users' columns; one row per user
    ingest.json       counts, time range, digest

Events are streamed and keep the order they had.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.datasets import RawLog
from recsys.columns import ACTION, EVENT_ID, ITEM_ID, SESSION_ID, TEXT, TIMESTAMP, USER_ID, VALUE
from recsys.errors import DataError
from recsys.files import sha256_file, sha256_json, whole_directory, write_json

REQUIRED = (USER_ID, ITEM_ID, TIMESTAMP)
OPTIONAL = {ACTION: pl.String(), VALUE: pl.Float64(), SESSION_ID: pl.String(), EVENT_ID: pl.String()}


@dataclass(frozen=True)
class IngestSummary:
    """What was taken in. Times are microseconds UTC; `digest` is SHA-256 over the three files."""

    source: str
    events: int
    users: int
    items: int
    catalogue_items: int
    first_time: int
    last_time: int
    columns: tuple[str, ...]
    digest: str


def ingest(raw: RawLog, directory: Path) -> IngestSummary:
    """Check a raw log and write it as canonical files; `directory` appears whole or not at all.

    Raises:
        DataError: a missing column, a column of a type that cannot be meant, no events, a missing id or time, or an
            id that stands twice in the item or user table. The message names the source, the table and the column.

    Cost: streaming; memory does not grow with the number of events.
    """
    events = _canonical_events(raw)
    with whole_directory(directory) as out:
        events.sink_parquet(out / "events.parquet", compression="zstd")
        written = pl.scan_parquet(out / "events.parquet")
        counts = _check_events(raw.name, written)
        for table, frame, key in (("items", raw.items, ITEM_ID), ("users", raw.users, USER_ID)):
            _canonical_table(raw.name, table, frame, key, written).write_parquet(out / f"{table}.parquet")
        files = {name: sha256_file(out / name) for name in ("events.parquet", "items.parquet", "users.parquet")}
        summary = IngestSummary(
            source=raw.name,
            events=counts["events"],
            users=counts["users"],
            items=counts["items"],
            catalogue_items=pl.scan_parquet(out / "items.parquet").select(pl.len()).collect().item(),
            first_time=counts["first_time"],
            last_time=counts["last_time"],
            columns=tuple(written.collect_schema().names()),
            digest=sha256_json(files),
        )
        write_json(out / "ingest.json", asdict(summary))
    return summary


def _canonical_events(raw: RawLog) -> pl.LazyFrame:
    """Give the events' known columns in their canonical types; columns of other names are dropped."""
    schema = _schema(raw.name, "events", raw.events)
    missing = [name for name in REQUIRED if name not in schema]
    if missing:
        raise DataError(
            f"{raw.name}, events: no column {', '.join(map(repr, missing))}; found {', '.join(schema) or 'none'}; "
            f"map the log's own names to {', '.join(REQUIRED)}"
        )
    columns = [pl.col(USER_ID).cast(pl.String), pl.col(ITEM_ID).cast(pl.String), _time(raw.name, schema[TIMESTAMP])]
    columns += [pl.col(name).cast(kind) for name, kind in OPTIONAL.items() if name in schema]
    return raw.events.select(columns)


def _time(source: str, kind: pl.DataType) -> pl.Expr:
    """Give int64 microseconds UTC: integers as they are, dates and datetimes converted (naive ones are UTC)."""
    column = pl.col(TIMESTAMP)
    if kind.is_integer():
        return column.cast(pl.Int64)
    if kind.is_temporal() and isinstance(kind, pl.Date | pl.Datetime):
        return column.cast(pl.Datetime("us", getattr(kind, "time_zone", None))).cast(pl.Int64)
    raise DataError(
        f"{source}, events: column {TIMESTAMP!r} is {kind}; "
        "expected integer microseconds since 1970 UTC (or a position), or a datetime"
    )


def _check_events(source: str, events: pl.LazyFrame) -> dict[str, int]:
    """Count what was written; refuse an empty log and missing ids or times."""
    counts: dict[str, Any] = (
        events.select(
            pl.len().alias("events"),
            pl.col(USER_ID).n_unique().alias("users"),
            pl.col(ITEM_ID).n_unique().alias("items"),
            pl.col(TIMESTAMP).min().alias("first_time"),
            pl.col(TIMESTAMP).max().alias("last_time"),
            *(pl.col(name).null_count().alias(f"null_{name}") for name in REQUIRED),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    if counts["events"] == 0:
        raise DataError(f"{source}, events: the log is empty; expected at least one event")
    for name in REQUIRED:
        if nulls := counts[f"null_{name}"]:
            row = _first_null(events, name)
            raise DataError(
                f"{source}, events: column {name!r} is missing in {nulls:,} of {counts['events']:,} rows, "
                f"first in row {row:,} (counted from 0); drop or repair these rows"
            )
    return counts


def _first_null(events: pl.LazyFrame, name: str) -> int:
    rows = events.with_row_index("row").filter(pl.col(name).is_null()).select("row").head(1).collect()
    return int(rows.item())


def _canonical_table(
    source: str, table: str, frame: pl.LazyFrame | None, key: str, events: pl.LazyFrame
) -> pl.DataFrame:
    """Give an item or user table with string ids, once each; a log without the table gets its bare ids."""
    if frame is None:
        frame = events.select(pl.col(key).unique()).sort(key)
    schema = _schema(source, table, frame)
    if key not in schema:
        raise DataError(f"{source}, {table}: no column {key!r}; found {', '.join(schema) or 'none'}")
    rows = frame.with_columns(pl.col(key).cast(pl.String)).collect()
    if nulls := rows[key].null_count():
        raise DataError(f"{source}, {table}: column {key!r} is missing in {nulls:,} of {rows.height:,} rows")
    if twice := rows.filter(pl.col(key).is_duplicated())[key].sort().head(1).to_list():
        raise DataError(f"{source}, {table}: {key} {twice[0]!r} stands in more than one row; expected one row per id")
    if key == USER_ID:
        return rows
    text = pl.coalesce(pl.col(TEXT).cast(pl.String), key) if TEXT in rows.columns else pl.col(key)
    rows = rows.with_columns(text.alias(TEXT))
    return rows.select(key, TEXT, pl.exclude(key, TEXT))


def _schema(source: str, table: str, frame: pl.LazyFrame) -> pl.Schema:
    try:
        return frame.collect_schema()
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{source}, {table}: cannot be read ({error})") from None
