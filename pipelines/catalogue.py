"""Who is who: keys that never change once given, and the item table's codes.

A key is given at first sight: in the order of first events, equal moments by id, ids without events last. A later
preparation passes the earlier one's tables; their keys stay, and only what is new gets the next numbers.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch

from pipelines.buckets import BUCKET, USER_ROW, bucket_of, user_hashes
from pipelines.prepared import PreparedSet
from ranking.batch import FIRST_ITEM, UNKNOWN
from ranking.items import ItemTable, Transitions
from recsys.columns import ACTION, ITEM_ID, ITEM_KEY, TEXT, TIMESTAMP, USER_ID, USER_KEY
from recsys.errors import DataError
from recsys.history import UNKNOWN_KEY

USER_HASH = "user_hash"
TRAIN_COUNT = "train_count"
MAX_ACTIONS = 255
CODES_OF_NO_VALUE = 2
"""codes 0 and 1 of a categorical column: padding and missing"""


def catalogue(events: pl.LazyFrame, items: Path, previous: PreparedSet | None) -> pl.DataFrame:
    """Give item_key, item_id, text and the catalogue's columns; row i is item key i.

    Holds every item of the log, of the item table, and of the previous preparation (whose attributes serve where the
    new item table no longer has the item).
    """
    earlier = None if previous is None else previous.catalogue.drop(TRAIN_COUNT)
    table = _keyed(events, pl.read_parquet(items), earlier, ITEM_ID, ITEM_KEY)
    if table.height >= UNKNOWN_KEY:
        raise DataError(f"{items}: {table.height:,} items; at most {UNKNOWN_KEY - 1:,} keys can be given")
    return table.with_columns(pl.coalesce(TEXT, ITEM_ID).alias(TEXT)).select(
        ITEM_KEY, ITEM_ID, TEXT, pl.exclude(ITEM_KEY, ITEM_ID, TEXT)
    )


def users(events: pl.LazyFrame, table: Path, previous: PreparedSet | None, buckets: int) -> pl.DataFrame:
    """Give user_key, user_id and the users' columns by history row, with user_row, user_hash and bucket beside them."""
    earlier = None if previous is None else previous.users
    keyed = _keyed(events, pl.read_parquet(table), earlier, USER_ID, USER_KEY)
    hashes = user_hashes(keyed[USER_ID].to_list())
    return (
        keyed.with_columns(pl.Series(USER_HASH, hashes), pl.Series(BUCKET, bucket_of(hashes, buckets)))
        .sort(USER_HASH, USER_ID)
        .with_row_index(USER_ROW)
        .select(USER_KEY, USER_ID, pl.exclude(USER_KEY, USER_ID))
    )


def action_names(events: pl.LazyFrame, previous: PreparedSet | None) -> list[str]:
    """Give the names of action codes 1, 2, ...: those of the previous preparation, then new ones in alphabetical order.

    Raises:
        DataError: more names than a byte can number.
    """
    names = [] if previous is None else [str(name) for name in previous.manifest["actions"]]
    if ACTION in events.collect_schema().names():
        found = events.select(pl.col(ACTION).unique()).collect(engine="streaming")[ACTION].drop_nulls().to_list()
        names += sorted(set(found) - set(names))
    if len(names) > MAX_ACTIONS:
        raise DataError(f"column {ACTION!r} has {len(names)} different values; at most {MAX_ACTIONS} can be numbered")
    return names


def _keyed(events: pl.LazyFrame, table: pl.DataFrame, earlier: pl.DataFrame | None, id_: str, key: str) -> pl.DataFrame:
    """Give every id with its key (uint32, ascending) and the table's columns."""
    first = events.group_by(id_).agg(pl.col(TIMESTAMP).min()).collect(engine="streaming")
    seen = first.join(table.select(id_), on=id_, how="full", coalesce=True)
    kept = pl.DataFrame(schema={id_: pl.String, key: pl.UInt32}) if earlier is None else earlier.select(id_, key)
    new = (
        seen.join(kept, on=id_, how="anti")
        .sort(TIMESTAMP, id_, nulls_last=True)
        .with_row_index(key, offset=kept.height)
        .select(id_, pl.col(key).cast(pl.UInt32))
    )
    attributes = table
    if earlier is not None:
        gone = earlier.drop(key).join(table.select(id_), on=id_, how="anti")
        attributes = pl.concat([table, gone], how="diagonal_relaxed")
    return pl.concat([kept, new]).join(attributes, on=id_, how="left").sort(key)


def categorical_columns(items: pl.DataFrame, wanted: Sequence[str] | None) -> list[str]:
    """Give the columns to code: those asked for, or all text-like ones of the catalogue except id and text.

    Raises:
        DataError: a column asked for that the catalogue does not have; the message names those it has.
    """
    own = {ITEM_KEY, ITEM_ID, TEXT}
    found = [
        name
        for name, kind in items.schema.items()
        if name not in own and (kind in (pl.String, pl.Boolean) or isinstance(kind, pl.Categorical | pl.Enum))
    ]
    if wanted is None:
        return found
    usable = [name for name in items.columns if name not in own]
    for name in wanted:
        if name not in usable:
            raise DataError(f"items: no column {name!r} to code; the catalogue has {', '.join(usable) or 'none'}")
    return list(wanted)


def vocabulary(items: pl.DataFrame, columns: Sequence[str]) -> dict[str, list[str]]:
    """Give the sorted values of each column; value i has code i + 2."""
    return {name: items[name].cast(pl.String).drop_nulls().unique().sort().to_list() for name in columns}


def item_table(
    items: pl.DataFrame, values: dict[str, list[str]], count: torch.Tensor, transitions: Transitions
) -> ItemTable:
    """Build the table models look items up in; `count` int64 [V] by model row, V = items + 2."""
    codes = np.zeros((items.height + FIRST_ITEM, len(values)), np.int32)
    codes[UNKNOWN] = 1
    for place, (name, known) in enumerate(values.items()):
        code = items[name].cast(pl.String).cast(pl.Enum(known)).to_physical().cast(pl.Int32) + CODES_OF_NO_VALUE
        codes[FIRST_ITEM:, place] = code.fill_null(1).to_numpy()
    cardinality = [len(known) + CODES_OF_NO_VALUE for known in values.values()]
    return ItemTable(list(values), torch.from_numpy(codes), cardinality, count, transitions)
