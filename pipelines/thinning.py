"""What is done to a log of checked events as a whole: repeated ids, busy and rare users, rare items out; sessions cut.

All of it is bounded in memory by the number of users and items, or by a stated number of rows, never by the log.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from recsys.columns import EVENT_ID, ITEM_ID, SESSION_ID, TIMESTAMP, USER_ID

ROWS_AT_ONCE = 10_000_000
SESSION_ROWS_AT_ONCE = 2_000_000
INDEX = "_index"
_BUCKET = "_bucket"


def repeated_ids(events: pl.LazyFrame, rows: int, at_once: int = ROWS_AT_ONCE) -> NDArray[np.uint32]:
    """Return the places of the events whose event_id an earlier row already has; events without one never are.

    Args:
        events: with event_id; places count from 0.
        rows: their number.
        at_once: rows compared in one pass over the ids.

    Cost: one pass over the ids and about 40 bytes of memory per row for every `at_once` rows. Ids are compared by 128
    bits of hash.
    """
    first, second = pl.col(EVENT_ID).hash(11), pl.col(EVENT_ID).hash(12)
    hashes = events.with_row_index(INDEX).filter(pl.col(EVENT_ID).is_not_null()).select(INDEX, a=first, b=second)
    passes = max(1, math.ceil(rows / at_once))
    found = []
    for number in range(passes):
        part = hashes.filter(pl.col("a") % passes == number).collect(engine="streaming")
        ordered = np.sort(part["a"].to_numpy())
        twice = pl.Series(np.unique(ordered[1:][ordered[1:] == ordered[:-1]]), dtype=pl.UInt64)
        some = part.join(twice.to_frame("a"), on="a", how="semi").sort(INDEX)
        found.append(some.filter(~pl.struct("a", "b").is_first_distinct())[INDEX].to_numpy())
    return np.sort(np.concatenate(found))


def busiest(events: pl.LazyFrame, most: int) -> pl.DataFrame:
    """Return user_id and number of events, `len`, of the users with more than `most` events. Cost: one pass."""
    counts = events.group_by(USER_ID).agg(pl.len()).filter(pl.col("len") > most)
    return counts.sort(USER_ID).collect(engine="streaming")


@dataclass(frozen=True)
class Core:
    """Users and items that stay, and how many events went: for a rare user, for a rare item."""

    users: pl.DataFrame
    items: pl.DataFrame
    events: int
    rare_users: int
    rare_items: int

    def of(self, events: pl.LazyFrame) -> pl.LazyFrame:
        """Return the events of what stays, in their order."""
        kept = events.join(self.users.lazy(), on=USER_ID, how="semi", maintain_order="left")
        return kept.join(self.items.lazy(), on=ITEM_ID, how="semi", maintain_order="left")


def core(events: pl.LazyFrame, min_user_events: int, min_item_events: int, work: Path) -> Core:
    """Return the largest set of users and items in which every one has enough events with the others.

    Users and items get numbers once, in one pass over the log; the rounds then count numbers, not ids.

    Args:
        events: user_id, item_id.
        min_user_events: of a user that stays.
        min_item_events: of an item that stays.
        work: an existing directory for 8 bytes per event.
    """
    users, items = (events.select(pl.col(name).unique()).collect(engine="streaming") for name in (USER_ID, ITEM_ID))
    pairs = work / "pairs.parquet"
    (
        events.select(USER_ID, ITEM_ID)
        .join(users.lazy().with_row_index("user"), on=USER_ID)
        .join(items.lazy().with_row_index("item"), on=ITEM_ID)
        .select(pl.col("user", "item").cast(pl.UInt32))
        .sink_parquet(pairs, compression="lz4")
    )
    rows = int(pl.scan_parquet(pairs).select(pl.len()).collect().item())
    alive_users, alive_items = np.ones(users.height, np.bool_), np.ones(items.height, np.bool_)
    gone = {"user": 0, "item": 0}
    least = {"user": min_user_events, "item": min_item_events}
    left, settled = rows, False
    while not settled:
        settled = True
        for side, alive in (("user", alive_users), ("item", alive_items)):
            counts = _counts(pairs, rows, alive_users, alive_items, side, len(alive))
            rare = alive & (counts < least[side])
            gone[side] += int(counts[rare].sum())
            left -= int(counts[rare].sum())
            settled &= not rare.any()
            alive &= ~rare
    return Core(users.filter(alive_users), items.filter(alive_items), left, gone["user"], gone["item"])


def _counts(
    pairs: Path, rows: int, users: NDArray[np.bool_], items: NDArray[np.bool_], side: str, size: int
) -> NDArray[np.int64]:
    """Count the events of every user or item between users and items that are still there."""
    counts = np.zeros(size, np.int64)
    for start in range(0, rows, ROWS_AT_ONCE):
        part = pl.scan_parquet(pairs).slice(start, ROWS_AT_ONCE).collect()
        both = users[part["user"].to_numpy()] & items[part["item"].to_numpy()]
        counts += np.bincount(part[side].to_numpy()[both], minlength=size)
    return counts


def cut_sessions(
    events: pl.LazyFrame, rows: int, gap: int, work: Path, at_once: int = SESSION_ROWS_AT_ONCE
) -> pl.LazyFrame:
    """Return the events with a session_id: a new session begins where a user was away for more than `gap` microseconds.

    A session is named by its first moment, so that its name does not change when later events are added. Events come
    out by user and time, one group of users after the other.

    Args:
        events: user_id, item_id, timestamp and any columns.
        rows: their number.
        gap: microseconds.
        work: an existing directory for a copy of the log.
        at_once: rows sorted at a time, about; a user is never divided.
    """
    groups = max(1, math.ceil(rows / at_once))
    parts = work / "sessions"
    parts.mkdir()
    grouped = events.with_columns((pl.col(USER_ID).hash(13) % groups).cast(pl.UInt32).alias(_BUCKET))
    grouped.sink_parquet(pl.PartitionBy(parts, key=_BUCKET, include_key=False), mkdir=True, compression="lz4")
    cut = []
    for number, folder in enumerate(sorted(parts.glob(f"{_BUCKET}=*"))):
        target = work / f"session{number}.parquet"
        rows_of_some = pl.read_parquet(sorted(folder.glob("*.parquet"))).sort(USER_ID, TIMESTAMP, ITEM_ID)
        rows_of_some.with_columns(session_names(gap).alias(SESSION_ID)).write_parquet(target, compression="lz4")
        cut.append(target)
    return pl.scan_parquet(cut)


def session_names(gap: int) -> pl.Expr:
    """Return the session of each event, cut as `cut_sessions` does, among rows sorted by user and time."""
    user, time = pl.col(USER_ID), pl.col(TIMESTAMP)
    begins = ((user != user.shift()) | (time - time.shift() > gap)).fill_null(True)
    return pl.when(begins).then(time).forward_fill().cast(pl.String)
