"""Takes a raw log into the system: checked, in canonical columns and types, as Parquet files.

    events.parquet        user_id, item_id, timestamp; action, value, session_id, event_id where the log has them
    items.parquet         item_id, text, the catalogue's columns; one row per item
    users.parquet         user_id, the users' columns; one row per user
    impressions.parquet   request_id, user_id, item_id, timestamp, label; only where the log has them. Those of our own
                          service have position (from 1) and propensity too
    ingest.json           the data card (pipelines.cards): counts, time range, what was left out and why, digest

`ingest` takes a log in canonical columns, `ingest_files` any files that a mapping describes. Events are streamed and
keep the order they had, unless sessions had to be cut.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from pipelines.cards import DataCard, Tally
from pipelines.datasets import RawLog
from pipelines.event_facts import EventFacts, measure_events, write_users
from pipelines.mapped import read_mapped
from pipelines.mapping import IngestConfig
from recsys.columns import (
    ACTION,
    EVENT_ID,
    ITEM_ID,
    LABEL,
    REQUEST_ID,
    SESSION_ID,
    TEXT,
    TIMESTAMP,
    USER_ID,
    VALUE,
)
from recsys.errors import DataError
from recsys.files import sha256_file, sha256_json, whole_directory, work_directory, write_json

REQUIRED = (USER_ID, ITEM_ID, TIMESTAMP)
OPTIONAL = {ACTION: pl.String(), VALUE: pl.Float64(), SESSION_ID: pl.String(), EVENT_ID: pl.String()}


MORE_OF_IMPRESSIONS = {"position": pl.Int32(), "propensity": pl.Float64()}
IMPRESSIONS = {REQUEST_ID: pl.String(), USER_ID: pl.String(), ITEM_ID: pl.String(), TIMESTAMP: pl.Int64()}


def ingest_files(config: IngestConfig, folder: Path, directory: Path, name: str) -> DataCard:
    """Read the files a mapping describes and write them as canonical ones; see `ingest`.

    Bad rows go to quarantine.parquet beside `directory`, with file, row, column, what was found and what was expected;
    also when there are too many of them and nothing else is written.

    Args:
        config: the mapping (`pipelines.mapping.load_mapping`).
        folder: where its relative paths start.
        directory: appears whole or not at all.
        name: what manifests and reports call the log.

    Raises:
        DataError: files, columns or rows that are not what the mapping says, too many bad rows, nothing left.
    """
    with work_directory(directory) as work:
        raw = read_mapped(config, folder, name, work, quarantine_of(directory))
        return ingest(raw, directory)


def quarantine_of(directory: Path) -> Path:
    """Return where the bad rows of a log are kept: beside it, so that they are there when the log is refused."""
    return directory.with_name("quarantine.parquet")


def ingest(raw: RawLog, directory: Path) -> DataCard:
    """Check a raw log and write it as canonical files; `directory` appears whole or not at all.

    Raises:
        DataError: a missing column, a column of an unusable type, no events, a missing id or time, or an
            id that stands twice in the item or user table. The message names the source, the table and the column.

    Cost: memory grows with the items, the user table if there is one, and 8 bytes a user, not with the events.
    """
    events = _canonical_events(raw)
    names = ["events.parquet", "items.parquet", "users.parquet"]
    with whole_directory(directory) as out, work_directory(directory) as work:
        events.sink_parquet(out / "events.parquet", compression="zstd")
        written = pl.scan_parquet(out / "events.parquet")
        count = _check_events(raw.name, written)
        facts = measure_events(out / "events.parquet", count, work)
        missing = _write_items(raw, out, facts.items)
        if raw.users is None:
            write_users(out / "events.parquet", facts.first_rows, out / "users.parquet", work)
        else:
            _canonical_table(raw.name, "users", raw.users, USER_ID).write_parquet(out / "users.parquet")
        if raw.impressions is not None:
            wanted = {**IMPRESSIONS, LABEL: pl.UInt8()}
            there = raw.impressions.collect_schema()
            wanted |= {name: kind for name, kind in MORE_OF_IMPRESSIONS.items() if name in there}
            columns = [pl.col(name).cast(kind) for name, kind in wanted.items()]
            raw.impressions.select(columns).sink_parquet(out / "impressions.parquet", compression="zstd")
            names.append("impressions.parquet")
        card = _card(raw, out, names, facts, count, missing)
        write_json(out / "ingest.json", asdict(card))
    return card


class _Missing(NamedTuple):
    """Items with events that have no row in the item table, the first ids of them, and those that have no text."""

    rows: int
    some: tuple[str, ...]
    texts: int


def _card(raw: RawLog, out: Path, names: list[str], facts: EventFacts, count: int, missing: _Missing) -> DataCard:
    """Return the data card of what was written under `out`."""
    rows = {name: int(pl.scan_parquet(out / name).select(pl.len()).collect().item()) for name in names}
    tally = raw.tally or Tally(count)
    return DataCard(
        source=raw.name,
        events=count,
        read=tally.read,
        filtered=dict(tally.filtered),
        bad=dict(tally.bad),
        users=facts.users,
        items=len(facts.items),
        catalogue_items=rows["items.parquet"],
        in_catalogue=len(facts.items) - missing.rows,
        not_in_catalogue=missing.some,
        missing_text=missing.texts,
        impressions=rows.get("impressions.parquet", 0),
        bad_impressions=tally.bad_impressions,
        settled=dict(tally.settled),
        bad_of_tables=dict(tally.bad_of_tables),
        order=raw.order,
        first_time=facts.first_time,
        last_time=facts.last_time,
        history=facts.history,
        repeated_share=facts.repeated_share,
        columns=tuple(pl.read_parquet_schema(out / "events.parquet")),
        positive=raw.positive,
        sessions=raw.sessions,
        actions=_actions(out / "events.parquet"),
        digest=sha256_json({name: sha256_file(out / name) for name in names}),
    )


def _actions(events: Path) -> dict[str, int]:
    """Return the events by action, most first."""
    frame = pl.scan_parquet(events)
    if ACTION not in frame.collect_schema():
        return {}
    counted = frame.group_by(pl.col(ACTION).fill_null("")).agg(pl.len()).sort("len", ACTION, descending=[True, False])
    return dict(counted.collect(engine="streaming").iter_rows())


def _canonical_events(raw: RawLog) -> pl.LazyFrame:
    """Return the events' known columns in their canonical types; columns of other names are dropped."""
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
    """Return int64 microseconds UTC: integers as they are, dates and datetimes converted (naive ones are UTC)."""
    column = pl.col(TIMESTAMP)
    if kind.is_integer():
        return column.cast(pl.Int64)
    if kind.is_temporal() and isinstance(kind, pl.Date | pl.Datetime):
        return column.cast(pl.Datetime("us", getattr(kind, "time_zone", None))).cast(pl.Int64)
    raise DataError(
        f"{source}, events: column {TIMESTAMP!r} is {kind}; "
        "expected integer microseconds since 1970 UTC (or a position), or a datetime"
    )


def _check_events(source: str, events: pl.LazyFrame) -> int:
    """Count what was written; refuse an empty log and missing ids or times."""
    nulls = (pl.col(name).null_count().alias(name) for name in REQUIRED)
    counts: dict[str, Any] = (
        events.select(pl.len().alias("events"), *nulls).collect(engine="streaming").row(0, named=True)
    )
    if counts["events"] == 0:
        raise DataError(f"{source}, events: the log is empty; expected at least one event")
    for name in REQUIRED:
        if counts[name]:
            row = _first_null(events, name)
            raise DataError(
                f"{source}, events: column {name!r} is missing in {counts[name]:,} of {counts['events']:,} rows, "
                f"first in row {row:,} (counted from 0); drop or repair these rows"
            )
    return int(counts["events"])


def _first_null(events: pl.LazyFrame, name: str) -> int:
    rows = events.with_row_index("row").filter(pl.col(name).is_null()).select("row").head(1).collect()
    return int(rows.item())


def _write_items(raw: RawLog, out: Path, with_events: pl.Series) -> _Missing:
    """Write items.parquet, the id standing in for a missing text; give what it lacks."""
    seen = with_events.to_frame()
    frame = seen.lazy().sort(ITEM_ID) if raw.items is None else raw.items
    items = _canonical_table(raw.name, "items", frame, ITEM_ID)
    text = pl.col(TEXT).cast(pl.String) if TEXT in items.columns else pl.lit(None, pl.String)
    items = items.with_columns(text.alias(TEXT)).select(ITEM_ID, TEXT, pl.exclude(ITEM_ID, TEXT))
    strange = seen.join(items, on=ITEM_ID, how="anti")[ITEM_ID].sort()
    without = seen.join(items.filter(pl.col(TEXT).is_not_null()), on=ITEM_ID, how="anti")
    items.with_columns(pl.coalesce(TEXT, ITEM_ID).alias(TEXT)).write_parquet(out / "items.parquet")
    return _Missing(len(strange), tuple(strange.head(3)), without.height)


def _canonical_table(source: str, table: str, frame: pl.LazyFrame, key: str) -> pl.DataFrame:
    """Return an item or user table with string ids, once each."""
    schema = _schema(source, table, frame)
    if key not in schema:
        raise DataError(f"{source}, {table}: no column {key!r}; found {', '.join(schema) or 'none'}")
    rows = frame.with_columns(pl.col(key).cast(pl.String)).collect()
    if nulls := rows[key].null_count():
        raise DataError(f"{source}, {table}: column {key!r} is missing in {nulls:,} of {rows.height:,} rows")
    if twice := rows.filter(pl.col(key).is_duplicated())[key].sort().head(1).to_list():
        raise DataError(f"{source}, {table}: {key} {twice[0]!r} stands in more than one row; expected one row per id")
    return rows


def _schema(source: str, table: str, frame: pl.LazyFrame) -> pl.Schema:
    try:
        return frame.collect_schema()
    except (FileNotFoundError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{source}, {table}: cannot be read ({error})") from None
