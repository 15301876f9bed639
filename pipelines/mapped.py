"""A team's own files, as its mapping describes them, turned into a `RawLog` that `ingest` takes.

In this order:

look          every file's kind, columns, and whether it can be parsed at all (pipelines.sources)
tables        items and users, small enough to be read whole (pipelines.side_tables)
check         rows to canonical columns; kept, filtered or bad; the bad ones to quarantine (pipelines.quarantine)
thin          repeated event ids, busy and rare users, rare items out; sessions cut (pipelines.thinning)
"""

from dataclasses import replace
from pathlib import Path

import polars as pl

from pipelines import thinning
from pipelines.cards import Tally
from pipelines.datasets import RawLog
from pipelines.fields import number_reader, read_id, read_label, read_name, read_position, time_reader
from pipelines.mapping import FiltersConfig, IngestConfig
from pipelines.quarantine import FILE, KEPT, Checked, Wanted, check_rows, refuse_if_too_bad, write_quarantine
from pipelines.side_tables import read_items, read_users
from pipelines.sources import ROW, Table, find_files, open_table
from recsys.columns import (
    ACTION,
    EVENT_ID,
    ITEM_ID,
    LABEL,
    REQUEST_ID,
    SESSION_ID,
    TIMESTAMP,
    USER_ID,
    VALUE,
)
from recsys.errors import DataError


def read_mapped(config: IngestConfig, folder: Path, name: str, work: Path, quarantine: Path) -> RawLog:
    """Return the log a mapping describes; its frames read from `work`, which must outlive them.

    Args:
        config: the mapping.
        folder: where its relative paths start.
        name: what messages and manifests call the log.
        work: an existing, empty directory; takes about the size of the log, twice where sessions are cut.
        quarantine: Parquet file that takes the bad rows; what an earlier run left there goes if none is bad.

    Raises:
        DataError: files that cannot be read, a column that is not there, too many bad rows, nothing left.

    Cost: streaming; memory grows with the users and items, not with the events.
    """
    sides = [table for table in (read_items(config, folder), read_users(config, folder)) if table is not None]
    refused = " ".join(filter(None, (table.why_not(config.quality.max_bad_share, quarantine) for table in sides)))
    found = {table.name: table.bad for table in sides}
    if refused:
        write_quarantine({}, quarantine, found)
        raise DataError(refused)
    read_number = number_reader(config.numbers)
    tables = _tables(config.source.events, folder, "events")
    checked = {"events": check_rows(tables, _events(config), config.filters, read_number, work / "events.parquet")}
    if config.source.impressions:
        tables, wanted = _tables(config.source.impressions, folder, "impressions"), _impressions(config)
        checked["impressions"] = check_rows(tables, wanted, FiltersConfig(), read_number, work / "impressions.parquet")
    write_quarantine(checked, quarantine, found)
    for what, one in checked.items():
        refuse_if_too_bad(what, one, config.quality.max_bad_share, quarantine)
    impressions = checked.get("impressions")
    events, tally = _thinned(checked["events"], config, work)
    rows = {table.name: table.rows.lazy() for table in sides}
    return RawLog(
        name=name,
        events=events,
        items=rows.get("items"),
        users=rows.get("users"),
        impressions=impressions.rows().select([one.name for one in _impressions(config)]) if impressions else None,
        order="time" if config.columns.timestamp else "position",
        positive=config.requests.positive,
        sessions=config.sessions,
        tally=replace(
            tally,
            bad_impressions=impressions.bad if impressions else 0,
            settled={why: n for table in sides for why, n in table.settled.items()},
            bad_of_tables={why: n for table in sides for why, n in table.bad_by_rule().items()},
        ),
    )


def _tables(pattern: str, folder: Path, what: str) -> list[Table]:
    return [open_table(path) for path in find_files(pattern, folder, f"[source] {what}")]


def _events(config: IngestConfig) -> list[Wanted]:
    """Return the events' canonical columns, those the log has."""
    columns = config.columns
    wanted = [Wanted(USER_ID, columns.user_id, read_id), Wanted(ITEM_ID, columns.item_id, read_id)]
    if columns.timestamp:
        wanted.append(Wanted(TIMESTAMP, columns.timestamp, time_reader(config.time)))
    else:
        wanted.append(Wanted(TIMESTAMP, str(columns.position), read_position))
    optional = (
        (ACTION, columns.action, read_name),
        (VALUE, columns.value, number_reader(config.numbers)),
        (SESSION_ID, columns.session_id, read_name),
        (EVENT_ID, columns.event_id, read_name),
    )
    return wanted + [Wanted(name, column, reader) for name, column, reader in optional if column]


def _impressions(config: IngestConfig) -> list[Wanted]:
    columns = config.impressions
    readers = (
        (REQUEST_ID, columns.request_id, read_id),
        (USER_ID, columns.user_id, read_id),
        (ITEM_ID, columns.item_id, read_id),
        (TIMESTAMP, columns.timestamp, time_reader(config.time)),
        (LABEL, columns.label, read_label),
    )
    return [Wanted(name, column, reader, "impressions") for name, column, reader in readers]


def _thinned(checked: Checked, config: IngestConfig, work: Path) -> tuple[pl.LazyFrame, Tally]:
    """Take out repeated event ids, busy users, rare users and items; cut sessions; count what went and why."""
    filters, events, left = config.filters, checked.rows().drop(FILE, ROW), checked.counts[KEPT]
    filtered = {f"{rule.words} {rule.column}": n for rule, n in checked.by_rule("filtered").items()}
    bad = {f"{rule.column or 'row'}: expected {rule.words}": n for rule, n in checked.by_rule("bad").items()}
    if config.columns.event_id and len(gone := thinning.repeated_ids(events, left)):
        places = pl.LazyFrame({thinning.INDEX: gone})
        numbered = events.with_row_index(thinning.INDEX)
        events = numbered.join(places, on=thinning.INDEX, how="anti", maintain_order="left").drop(thinning.INDEX)
        filtered[f"repeated {config.columns.event_id}"] = len(gone)
        left -= len(gone)
    if filters.max_user_events is not None and (busy := thinning.busiest(events, filters.max_user_events)).height:
        events = events.join(busy.lazy(), on=USER_ID, how="anti", maintain_order="left")
        filtered[f"max_user_events = {filters.max_user_events}"] = int(busy["len"].sum())
        left -= int(busy["len"].sum())
        if not left:
            raise DataError(
                f"{', '.join(map(str, checked.files))}: no event is left: every user has more than max_user_events = "
                f"{filters.max_user_events} events; raise it"
            )
    if max(filters.min_user_events, filters.min_item_events) > 1:
        core = thinning.core(events, filters.min_user_events, filters.min_item_events, work)
        if core.events == 0:
            raise DataError(
                f"{', '.join(map(str, checked.files))}: no event is left of {left:,}: no users with min_user_events = "
                f"{filters.min_user_events} have items with min_item_events = {filters.min_item_events}; lower them"
            )
        rare = {
            f"min_user_events = {filters.min_user_events}": core.rare_users,
            f"min_item_events = {filters.min_item_events}": core.rare_items,
        }
        filtered |= {why: n for why, n in rare.items() if n}
        events, left = core.of(events), core.events
    if gap := config.sessions.microseconds:
        events = thinning.cut_sessions(events, left, gap, work)
    return events, Tally(checked.read, filtered, bad)
