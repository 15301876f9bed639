"""Who is who: keys that never change once given, and the item table's codes.

A key is given at first sight: part by part (`pipelines.parts`), within a part in the order of first events, equal
moments by id, ids without events last. A later preparation passes the earlier one's tables; their keys stay, and only
what is new gets the next numbers.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from pipelines.buckets import BUCKET, USER_ROW, bucket_of, user_hashes
from pipelines.parts import Part
from pipelines.prepared import PreparedSet
from pipelines.spans import NEWEST, Spans
from ranking.batch import FIRST_ITEM, UNKNOWN
from ranking.items import ItemTable, MultiValued
from recsys.columns import ACTION, ITEM_ID, ITEM_KEY, TEXT, TIMESTAMP, USER_ID, USER_KEY
from recsys.errors import DataError
from recsys.history import UNKNOWN_KEY, moment

USER_HASH = "user_hash"
TRAIN_COUNT = "train_count"
HASHED_AT_ONCE = 100_000
_FIRST = "_first"
MAX_ACTIONS = 255
CODES_OF_NO_VALUE = 2
"""codes 0 and 1 of a categorical column: padding and missing"""


def catalogue(parts: Sequence[Part], spans: Sequence[Spans], previous: PreparedSet | None) -> pl.DataFrame:
    """Return item_key, item_id, text and the catalogue's columns; row i is item key i.

    Holds every item of the log, of the item tables, and of the previous preparation.
    """
    table = None if previous is None else previous.catalogue.drop(TRAIN_COUNT)
    for part, span in zip(parts, spans, strict=True):
        newer = pl.read_parquet(part.items)
        # An item's bare id is no text: ingest gives it where a part has none.
        newer = newer.with_columns(pl.when(pl.col(TEXT) != pl.col(ITEM_ID)).then(pl.col(TEXT)).alias(TEXT))
        known = 0 if table is None else table.height
        table = _keyed(_described(span.items, newer, table, ITEM_ID, ITEM_KEY), known, ITEM_ID, ITEM_KEY)
        if table.height >= UNKNOWN_KEY:
            raise DataError(f"{part.items}: {table.height:,} items; at most {UNKNOWN_KEY - 1:,} keys can be given")
        table = table.with_columns(pl.coalesce(TEXT, ITEM_ID).alias(TEXT)).select(
            ITEM_KEY, ITEM_ID, TEXT, pl.exclude(ITEM_KEY, ITEM_ID, TEXT)
        )
    assert table is not None
    return table


def unlisted(items: pl.DataFrame, parts: Sequence[Part], previous: PreparedSet | None) -> NDArray[np.bool_]:
    """Return bool by item key: the items of the log that no catalogue has; none where there is no catalogue.

    A part whose item table holds bare ids came without a catalogue, so its rows say of no item that it is sold.

    Args:
        items: what `catalogue` gave.
        parts: the log.
        previous: the preparation that these parts are added to.
    """
    tables = [pl.read_parquet(part.items) for part in parts]
    known = [table[ITEM_ID] for table in tables if _says_something(table)]
    listed = np.zeros(items.height, bool)
    if known:
        listed = items[ITEM_ID].is_in(pl.concat(known).unique().implode()).to_numpy().copy()
    if previous is not None and _says_something(previous.catalogue.drop(TRAIN_COUNT, ITEM_KEY)):
        before = ~previous.items.unlisted.numpy()[FIRST_ITEM:]
        listed[: len(before)] |= before
    return ~listed if listed.any() else listed


def _says_something(table: pl.DataFrame) -> bool:
    """Say whether a table of items holds more than ids."""
    return table.width > len((ITEM_ID, TEXT)) or bool((table[TEXT] != table[ITEM_ID]).any())


def users(
    parts: Sequence[Part],
    spans: Sequence[Spans],
    previous: PreparedSet | None,
    buckets: int,
    newest: pl.DataFrame | None = None,
    hashes: NDArray[np.uint64] | None = None,
) -> pl.DataFrame:
    """Return user_key, user_id and the users' columns by history row, with user_row, user_hash and bucket beside them.

    Args:
        parts: the log.
        spans: of each part.
        previous: an earlier preparation whose keys stay.
        buckets: number of user buckets.
        newest: user_id and newest moment of the parts before these; absent if there are none.
        hashes: of the users of `previous`, by history row, where they are known.

    Raises:
        DataError: a user whose events do not all come after those of the parts before.

    Cost: the table itself, 40 bytes and its attributes a user, and twice that in passing.
    """
    table = None if previous is None else previous.users
    for part, span in zip(parts, spans, strict=True):
        people = part.users()
        rows, late, seen = [], [], []
        for division in range(span.divisions):
            some = span.users(division)
            if newest is not None:
                late.append(_late(some, span.of(newest, division)))
            if part is not parts[-1]:
                seen.append(some.select(USER_ID, NEWEST))
            earlier = None if table is None else span.of(table, division)
            rows.append(_described(some.drop(NEWEST), span.of(people, division), earlier, USER_ID, USER_KEY))
        del people
        _refuse_late(part, late)
        if seen:
            known = pl.concat(seen if newest is None else [newest, *seen])
            newest = known.group_by(USER_ID).agg(pl.col(NEWEST).max())
        table = _keyed(pl.concat(rows), 0 if table is None else table.height, USER_ID, USER_KEY)
        del rows
    assert table is not None
    before = np.empty(0, np.uint64)
    if previous is not None and hashes is not None:
        before = hashes[np.argsort(previous.users[USER_KEY].to_numpy())]
    # A piece at a time: millions of Python strings at once would be the largest thing in memory.
    new = table[USER_ID].slice(len(before))
    pieces = [user_hashes(new.slice(n, HASHED_AT_ONCE).to_list()) for n in range(0, len(new), HASHED_AT_ONCE)]
    hashes = np.concatenate([before, *pieces])
    return (
        table.with_columns(pl.Series(USER_HASH, hashes), pl.Series(BUCKET, bucket_of(hashes, buckets)))
        .sort(USER_HASH, USER_ID)
        .with_row_index(USER_ROW)
        .select(USER_KEY, USER_ID, pl.exclude(USER_KEY, USER_ID))
    )


def _late(span: pl.DataFrame, newest: pl.DataFrame) -> pl.DataFrame:
    """Return the users with an event that is not later than those before."""
    return span.drop(NEWEST).join(newest, on=USER_ID).filter(pl.col(TIMESTAMP) <= pl.col(NEWEST))


def _refuse_late(part: Part, found: Sequence[pl.DataFrame]) -> None:
    count = sum(late.height for late in found)
    if count:
        user, first, before = pl.concat(found).sort(USER_ID).select(USER_ID, TIMESTAMP, NEWEST).row(0)
        raise DataError(
            f"{part.file}: user {user!r} has an event at {moment(first)}, not after the user's newest event "
            f"{moment(before)} of the parts before ({count:,} such users); a later part holds later events only. "
            "Leave the late events out (`recsys prepare --add DIR --late leave-out`), or ingest the whole log "
            "as one ([source] events takes a glob of all its files), remove the parts under "
            "`later` that it holds, and prepare again"
        )


def action_names(spans: Sequence[Spans], known: Sequence[str]) -> list[str]:
    """Return the names of action codes 1, 2, ...: those known, then each part's new ones in alphabetical order.

    Raises:
        DataError: more names than a byte can number.
    """
    names = list(known)
    for span in spans:
        names += sorted(span.actions - set(names))
    if len(names) > MAX_ACTIONS:
        raise DataError(f"column {ACTION!r} has {len(names)} different values; at most {MAX_ACTIONS} can be numbered")
    return names


def _described(
    first: pl.DataFrame, table: pl.DataFrame, earlier: pl.DataFrame | None, id_: str, key: str
) -> pl.DataFrame:
    """Return every id with its key, null if it is new, its first moment, null if it has no events, and its attributes.

    `first` holds the first moment of every id with events, `table` the ids with attributes, `earlier` what was known.
    """
    if earlier is None:
        rows = table.with_columns(pl.lit(None, pl.UInt32).alias(key))
    else:
        rows = _laid_over(table, earlier, id_, key)
    return rows.join(first.select(id_, pl.col(TIMESTAMP).alias(_FIRST)), on=id_, how="full", coalesce=True)


def _keyed(rows: pl.DataFrame, known: int, id_: str, key: str) -> pl.DataFrame:
    """Return keys (uint32, ascending) to the rows of `_described` that have none; `known` keys are given already."""
    old = rows.filter(pl.col(key).is_not_null()).drop(_FIRST).sort(key)
    new = rows.filter(pl.col(key).is_null()).drop(key).sort(_FIRST, id_, nulls_last=True).drop(_FIRST)
    new = new.with_row_index(key, offset=known).with_columns(pl.col(key).cast(pl.UInt32))
    return pl.concat([old, new.select(old.columns)])


def _laid_over(newer: pl.DataFrame, older: pl.DataFrame, id_: str, key: str) -> pl.DataFrame:
    """Return the ids of both tables once, with keys as the older one has them, and attributes.

    What the newer table leaves empty keeps its older value.
    """
    both = pl.concat([newer, older.drop(key)], how="diagonal_relaxed")  # finds the common types
    above, below = both.head(newer.height), both.tail(older.height).with_columns(older[key])
    joined = above.join(below, on=id_, how="full", coalesce=True, suffix=" of before")
    names = [name for name in both.columns if name != id_]
    return joined.select(id_, key, *(pl.coalesce(name, f"{name} of before") for name in names))


def categorical_columns(items: pl.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    """Return the columns to code: those asked for, or all text-like ones of the catalogue except id and text.

    Raises:
        DataError: a column asked for that the catalogue does not have; the message names those it has.
    """
    if wanted is not None:
        for name in _existing(items, wanted, "code"):
            if isinstance(items.schema[name], pl.List):
                raise DataError(f"items: column {name!r} holds several values per item; expected it in multi")
        return list(wanted)
    text_like = (pl.String, pl.Boolean)
    return [
        name
        for name, kind in _attributes(items).items()
        if kind in text_like or isinstance(kind, pl.Categorical | pl.Enum)
    ]


def multi_columns(items: pl.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    """Return the columns of several values per item: those asked for, or all lists of the catalogue.

    Raises:
        DataError: a column asked for that is not there, or holds one value per item.
    """
    found = [name for name, kind in _attributes(items).items() if isinstance(kind, pl.List)]
    if wanted is None:
        return found
    for name in _existing(items, wanted, "read as several values"):
        if name not in found:
            raise DataError(f"items: column {name!r} is {items.schema[name]}; expected lists of values")
    return list(wanted)


def numeric_columns(items: pl.DataFrame, wanted: Sequence[str] | None, categorical: Sequence[str]) -> list[str]:
    """Return the columns of the table's dense part: those asked for, or all numbers that are not coded as categories.

    Raises:
        DataError: a column asked for that is not there, or holds no numbers.
    """
    found = {name: kind for name, kind in _attributes(items).items() if kind.is_numeric() or kind == pl.Boolean}
    if wanted is None:
        return [name for name, kind in found.items() if kind != pl.Boolean and name not in categorical]
    for name in _existing(items, wanted, "read as numbers"):
        if name not in found:
            raise DataError(f"items: column {name!r} is {items.schema[name]}; expected numbers")
    return list(wanted)


def _attributes(items: pl.DataFrame) -> dict[str, pl.DataType]:
    return {name: kind for name, kind in items.schema.items() if name not in (ITEM_KEY, ITEM_ID, TEXT)}


def _existing(items: pl.DataFrame, wanted: Sequence[str], purpose: str) -> list[str]:
    usable = list(_attributes(items))
    for name in wanted:
        if name not in usable:
            raise DataError(f"items: no column {name!r} to {purpose}; the catalogue has {', '.join(usable) or 'none'}")
    return list(wanted)


def vocabulary(items: pl.DataFrame, columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the sorted values of each column; value i has code i + 2."""
    return {name: _single(items[name]).drop_nulls().unique().sort().to_list() for name in columns}


def _single(column: pl.Series) -> pl.Series:
    """Return the values of a column as text, one after the other; a row without any has one null."""
    if isinstance(column.dtype, pl.List):
        column = column.list.explode(empty_as_null=True, keep_nulls=True)
    return column.cast(pl.String)


def _codes(values: pl.Series, known: Sequence[str]) -> NDArray[np.int32]:
    code = values.cast(pl.Enum(known)).to_physical().cast(pl.Int32) + CODES_OF_NO_VALUE
    return code.fill_null(1).to_numpy()


def item_table(
    items: pl.DataFrame,
    values: dict[str, list[str]],
    numeric: Sequence[str],
    count: torch.Tensor,
    unlisted: NDArray[np.bool_],
) -> ItemTable:
    """Build the table models look items up in, without transitions; `count` int64 [V] by model row, V = items + 2.

    `unlisted` marks, by item key, what is in no catalogue.

    `values` are the vocabularies of the categorical and of the multi-valued columns. Numbers come as they are, as
    float32, in the order of `numeric`; 0, and marked as missing, where a value is missing or not finite.
    """
    multi = {
        name: _multi_valued(items[name], known)
        for name, known in values.items()
        if isinstance(items.schema[name], pl.List)
    }
    values = {name: known for name, known in values.items() if name not in multi}
    codes = np.zeros((items.height + FIRST_ITEM, len(values)), np.int32)
    codes[UNKNOWN] = 1
    for place, (name, known) in enumerate(values.items()):
        codes[FIRST_ITEM:, place] = _codes(_single(items[name]), known)
    dense = np.zeros((items.height + FIRST_ITEM, len(numeric)), np.float32)
    missing = np.zeros(dense.shape, bool)
    for place, name in enumerate(numeric):
        number = items[name].cast(pl.Float32).fill_null(np.nan).to_numpy()
        missing[FIRST_ITEM:, place] = ~np.isfinite(number)
        dense[FIRST_ITEM:, place] = np.where(np.isfinite(number), number, 0)
    cardinality = [len(known) + CODES_OF_NO_VALUE for known in values.values()]
    return ItemTable(
        list(values),
        torch.from_numpy(codes),
        cardinality,
        count,
        None,
        torch.from_numpy(dense),
        numeric,
        multi,
        torch.from_numpy(missing),
        torch.from_numpy(np.concatenate([np.zeros(FIRST_ITEM, bool), unlisted])),
    )


def _multi_valued(column: pl.Series, known: Sequence[str]) -> MultiValued:
    """Return the codes of a column of lists; null, an empty list and a list of nulls are one missing value."""
    lists = column.list.drop_nulls().list.unique(maintain_order=True)
    length = lists.list.len().fill_null(0).clip(lower_bound=1).cast(pl.Int64).to_numpy()
    code = np.concatenate([np.arange(FIRST_ITEM, dtype=np.int32), _codes(_single(lists), known)])
    offsets = np.concatenate([np.arange(FIRST_ITEM), FIRST_ITEM + np.cumsum(length) - length, [len(code)]])
    return MultiValued(torch.from_numpy(offsets), torch.from_numpy(code), len(known) + CODES_OF_NO_VALUE)
