"""A team's own files, as its mapping describes them, turned into a `RawLog` that `ingest` takes.

In this order:

look          every file's kind, columns, and whether it can be parsed at all (pipelines.sources)
check         rows to canonical columns; kept, filtered or bad; the bad ones to quarantine (pipelines.quarantine)
thin          repeated event ids, rare users and items out; sessions cut (pipelines.thinning)
tables        items and users, small enough to be read whole
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl

from pipelines import thinning
from pipelines.cards import Tally
from pipelines.datasets import RawLog
from pipelines.fields import Reader, number_reader, read_id, read_label, read_name, read_position, time_reader
from pipelines.mapping import FiltersConfig, IngestConfig, ItemsConfig
from pipelines.quarantine import FILE, KEPT, Checked, Wanted, check_rows, refuse_if_too_bad, write_quarantine
from pipelines.sources import BROKEN, ROW, WHOLE_ROW, Table, find_files, open_table
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
from recsys.errors import ConfigError, DataError

_WHY = "_why"


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
    read_number = number_reader(config.numbers)
    tables = _tables(config.source.events, folder, "events")
    checked = {"events": check_rows(tables, _events(config), config.filters, read_number, work / "events.parquet")}
    if config.source.impressions:
        tables, wanted = _tables(config.source.impressions, folder, "impressions"), _impressions(config)
        checked["impressions"] = check_rows(tables, wanted, FiltersConfig(), read_number, work / "impressions.parquet")
    write_quarantine(checked, quarantine)
    for what, one in checked.items():
        refuse_if_too_bad(what, one, config.quality.max_bad_share, quarantine)
    impressions = checked.get("impressions")
    events, tally = _thinned(checked["events"], config, work)
    return RawLog(
        name=name,
        events=events,
        items=_items(config, folder),
        users=_users(config, folder),
        impressions=impressions.rows().select([one.name for one in _impressions(config)]) if impressions else None,
        order="time" if config.columns.timestamp else "position",
        positive=config.requests.positive,
        sessions=config.sessions,
        tally=replace(tally, bad_impressions=impressions.bad if impressions else 0),
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
    """Take out repeated event ids, then rare users and items; cut sessions; count what went and why."""
    filters, events, left = config.filters, checked.rows().drop(FILE, ROW), checked.counts[KEPT]
    filtered = {f"{rule.words} {rule.column}": n for rule, n in checked.by_rule("filtered").items()}
    bad = {f"{rule.column or 'row'}: expected {rule.words}": n for rule, n in checked.by_rule("bad").items()}
    if config.columns.event_id and len(gone := thinning.repeated_ids(events, left)):
        places = pl.LazyFrame({thinning.INDEX: gone})
        numbered = events.with_row_index(thinning.INDEX)
        events = numbered.join(places, on=thinning.INDEX, how="anti", maintain_order="left").drop(thinning.INDEX)
        filtered[f"repeated {config.columns.event_id}"] = len(gone)
        left -= len(gone)
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


def _items(config: IngestConfig, folder: Path) -> pl.LazyFrame | None:
    """Return item_id, text where the mapping names columns for it, and the attributes in canonical types."""
    if config.source.items is None:
        return None
    tables = _tables(config.source.items, folder, "items")
    rows = [_item_rows(place, table, config.items, number_reader(config.numbers)) for place, table in enumerate(tables)]
    return _whole_table(tables, rows, ITEM_ID, [config.items.item_id] * len(tables))


def _item_rows(place: int, table: Table, config: ItemsConfig, read_number: Reader) -> pl.LazyFrame:
    file = str(table.path)
    key = read_id(config.item_id, table.require(config.item_id, "[items] item_id"), file)
    values: dict[str, pl.Expr] = {ITEM_ID: key.value}
    problems = [(config.item_id, problem) for problem in key.problems(key.value)]
    if config.text:
        parts = [_text(name, table.require(name, "[items] text")) for name in config.text]
        values[TEXT] = _some(pl.concat_str(parts, separator=", ", ignore_nulls=True))
    for name in config.categorical:
        values[name] = _text(name, table.require(name, "[items] categorical"))
    for name, separator in config.multi.items():
        values[name] = _values(table, name, separator)
    for name in config.numeric:
        number = read_number(name, table.require(name, "[items] numeric"), file)
        values[name] = number.value
        problems += [(name, problem) for problem in number.problems(number.value)]
    whys = []
    for name, problem in problems:
        words = pl.lit(f"column {name!r}: expected {problem.expected}, found ")
        whys.append(pl.when(problem.holds).then(pl.concat_str(words, _shown(name))))
    names = [config.item_id, *config.text, *config.categorical, *config.multi, *config.numeric]
    return table.rows(names).select(
        pl.lit(place, pl.UInt32).alias(FILE),
        ROW,
        pl.coalesce(pl.when(BROKEN).then(pl.lit(f"expected {WHOLE_ROW[table.kind]}")), *whys).alias(_WHY),
        *(value.alias(name) for name, value in values.items()),
    )


def _values(table: Table, name: str, separator: str) -> pl.Expr:
    """Return the distinct values of a multi-valued column, in their order; none is null."""
    kind = table.require(name, "[items] multi")
    if isinstance(kind, pl.List):
        values = pl.col(name).cast(pl.List(pl.String))
    elif kind == pl.String and separator:
        values = pl.col(name).str.split(separator)
    else:
        raise ConfigError(
            f"[items] multi: column {name!r} of {table.path} is {kind} and its separator {separator!r}; expected text "
            'and its separator, e.g. genres = "|", or a list'
        )
    cleaned = values.list.eval(_some(pl.element().str.strip_chars())).list.drop_nulls()
    distinct = cleaned.list.unique(maintain_order=True)
    return pl.when(distinct.list.len() > 0).then(distinct)


def _users(config: IngestConfig, folder: Path) -> pl.LazyFrame | None:
    """Return user_id, named as in the events, and every other column as it is."""
    if config.source.users is None:
        return None
    tables = _tables(config.source.users, folder, "users")
    frames, ids = [], []
    for place, table in enumerate(tables):
        column = config.columns.user_id if config.columns.user_id in table.columns else USER_ID
        if column not in table.columns:
            table.require(config.columns.user_id, f"[columns] user_id; {USER_ID!r} would do as well")
        key = read_id(column, table.require(column, "[columns] user_id"), str(table.path))
        ids.append(column)
        others = [name for name in table.columns if name not in (column, USER_ID)]
        why = pl.coalesce(
            pl.when(BROKEN).then(pl.lit(f"expected {WHOLE_ROW[table.kind]}")),
            *(
                pl.when(problem.holds).then(pl.lit(f"column {column!r}: expected {problem.expected}"))
                for problem in key.problems(key.value)
            ),
        )
        frames.append(
            table.rows([column, *others]).select(
                pl.lit(place, pl.UInt32).alias(FILE), ROW, why.alias(_WHY), key.value.alias(USER_ID), *others
            )
        )
    return _whole_table(tables, frames, USER_ID, ids)


def _whole_table(
    tables: Sequence[Table], frames: Sequence[pl.LazyFrame], key: str, names: Sequence[str]
) -> pl.LazyFrame:
    """Read a table whole; refuse a row that is wrong and an id that stands twice, naming file, row and column.

    `names` are the columns of the ids, by file.
    """
    try:
        rows = pl.concat(frames, how="diagonal_relaxed").collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{', '.join(str(table.path) for table in tables)}: cannot be read ({error})") from None
    where = [str(table.path) for table in tables]
    wrong = rows.filter(pl.col(_WHY).is_not_null())
    if wrong.height:
        first = wrong.row(0, named=True)
        raise DataError(
            f"{where[first[FILE]]}, row {first[ROW]:,}, {first[_WHY]} ({wrong.height:,} such rows); mend or remove them"
        )
    twice = rows.filter(pl.col(key).is_duplicated())
    if twice.height:
        one, other = twice.filter(pl.col(key) == twice[key][0]).head(2).iter_rows(named=True)
        raise DataError(
            f"{where[other[FILE]]}, row {other[ROW]:,}, column {names[other[FILE]]!r}: {key} {other[key]!r} "
            f"stands already in {where[one[FILE]]}, row {one[ROW]:,}; expected one row per id (repeated ids: "
            f"{twice[key].n_unique():,})"
        )
    return rows.drop(FILE, ROW, _WHY).lazy()


def _text(name: str, kind: pl.DataType) -> pl.Expr:
    """Return a column as text without blanks around it; nothing, or blanks only, is null."""
    if kind.is_nested():
        return _some(pl.col(name).cast(pl.List(pl.String)).list.join(" "))
    return _some(pl.col(name).cast(pl.String).str.strip_chars())


def _some(text: pl.Expr) -> pl.Expr:
    return pl.when(text != "").then(text)


def _shown(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.String, strict=False).fill_null("nothing")
