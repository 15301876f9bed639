"""When each user and item of a part was first and last seen, found a slice of the log at a time.

One streaming pass over a long log holds the more decoded events, the longer it is, and the table of a group-by every
user at several times the size of the id. Slices hold neither: each gives a small table; those of users lie on disk,
divided by hash, and are put together one division at a time.
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from pipelines.parts import Part
from recsys.columns import ACTION, ITEM_ID, TIMESTAMP, USER_ID

ROWS_AT_ONCE = 1_000_000
"""Events read at once."""
EVENTS_PER_DIVISION = 10_000_000
NEWEST = "newest"
_DIVISION, _SEED = "division", 31
_USERS = {USER_ID: pl.String, TIMESTAMP: pl.Int64, NEWEST: pl.Int64}


@dataclass(frozen=True)
class Spans:
    """What one pass over a part's events gives.

    Attributes:
        items: item_id and the first timestamp of every item with events.
        actions: names of its actions; empty if it has none.
        divisions: number of divisions of the users.
        folder: holds user_id, first timestamp and newest of each slice's users, by division.
    """

    items: pl.DataFrame
    actions: frozenset[str]
    divisions: int
    folder: Path

    def users(self, division: int) -> pl.DataFrame:
        """Return user_id, timestamp (the first) and newest of the users of one division, once each."""
        files = [pl.read_ipc(file) for file in sorted(self.folder.glob(f"{division}-*.ipc"))]
        some = pl.concat([pl.DataFrame(schema=_USERS), *files])
        return some.group_by(USER_ID).agg(pl.col(TIMESTAMP).min(), pl.col(NEWEST).max())

    def of(self, table: pl.DataFrame, division: int) -> pl.DataFrame:
        """Return the rows of a table with user_id that are of one division."""
        return table if self.divisions == 1 else table.filter(_division(self.divisions) == division)


def read_spans(part: Part, folder: Path) -> Spans:
    """Go through a part's events once.

    Args:
        part: the events.
        folder: an existing, empty directory for the users.

    Cost: memory of `ROWS_AT_ONCE` events and of the items; a million events take about 0.15 CPU seconds.
    """
    divisions = max(1, -(-part.record.events // EVENTS_PER_DIVISION))
    columns = [name for name in (USER_ID, ITEM_ID, TIMESTAMP, ACTION) if name in part.columns]
    items, actions = pl.DataFrame(schema={ITEM_ID: pl.String, TIMESTAMP: pl.Int64}), set[str]()
    for start in range(0, part.record.events, ROWS_AT_ONCE):
        some = part.events.select(columns).slice(start, ROWS_AT_ONCE).collect()
        items = _firsts(pl.concat([items, _firsts(some)]))
        if ACTION in columns:
            actions |= set(some[ACTION].drop_nulls().unique().to_list())
        users = some.group_by(USER_ID).agg(pl.col(TIMESTAMP).min(), pl.col(TIMESTAMP).max().alias(NEWEST))
        users = users.with_columns(_division(divisions).alias(_DIVISION))
        for (division,), rows in users.partition_by(_DIVISION, as_dict=True, include_key=False).items():
            rows.write_ipc(folder / f"{division}-{start:012}.ipc")
    return Spans(items, frozenset(actions), divisions, folder)


def _firsts(events: pl.DataFrame) -> pl.DataFrame:
    return events.group_by(ITEM_ID).agg(pl.col(TIMESTAMP).min())


def _division(divisions: int) -> pl.Expr:
    return pl.col(USER_ID).hash(_SEED) % divisions
