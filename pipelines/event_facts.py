"""What a log of events is like: counted one part of its users at a time, so that memory is that of a part.

Users and items are 64-bit hashes here, divided on disk by user: 24 bytes an event until the end. Of a million users two
share a hash once in forty million logs; they would be counted as one.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.buckets import bucket_of
from recsys.columns import ITEM_ID, TIMESTAMP, USER_ID

ROWS_AT_ONCE = 1_000_000
"""Events read, and about as many counted, at once: 100 MB."""
QUANTILES = (10, 25, 50, 75, 90, 100)
_NEVER = np.iinfo(np.int64).max
_WORDS = ("user", "item", "row")


@dataclass(frozen=True)
class EventFacts:
    """What one log of events is like; see `pipelines.cards.DataCard`.

    `items` are the ids of all items with events; `first_rows` int64 [users], ascending, is each user's first row,
    counted from 0.
    """

    users: int
    items: pl.Series
    first_time: int
    last_time: int
    history: dict[str, int]
    repeated_share: float
    first_rows: NDArray[np.int64]


def measure_events(events: Path, count: int, work: Path, at_once: int = ROWS_AT_ONCE) -> EventFacts:
    """Return the facts of a canonical Parquet file of events.

    Args:
        events: the file.
        count: its rows, at least one.
        work: an empty directory for 24 bytes per event.
        at_once: events in memory; a user is never divided.

    Cost: memory grows with the items, by 8 bytes with each user, and with the events of the most active one. A million
    events take about 0.3 CPU seconds.
    """
    whole = _divide(events, count, work, at_once)
    lengths, firsts, distinct = np.zeros(1, np.int64), [], 0
    for part in sorted(work.iterdir()):
        words = pl.DataFrame(np.fromfile(part, np.uint64).reshape(-1, len(_WORDS)), schema=list(_WORDS))
        part.unlink()
        distinct += (words["user"] ^ words["item"]).n_unique()
        users = words.lazy().group_by("user").agg(pl.len(), pl.col("row").min()).collect()
        firsts.append(users["row"].to_numpy().astype(np.int64))
        some = np.bincount(users["len"].to_numpy())
        lengths = np.pad(lengths, (0, max(0, len(some) - len(lengths))))
        lengths[: len(some)] += some
    first_rows = np.sort(np.concatenate(firsts))
    return EventFacts(
        users=len(first_rows),
        items=whole.items,
        first_time=whole.first_time,
        last_time=whole.last_time,
        history=_quantiles(lengths),
        repeated_share=1 - distinct / count,
        first_rows=first_rows,
    )


@dataclass(frozen=True)
class _Whole:
    """What shows while the events are divided; see `EventFacts`."""

    items: pl.Series
    first_time: int
    last_time: int


def _divide(events: Path, count: int, work: Path, at_once: int) -> _Whole:
    """Write (hash of the user, hash of the item, row) of every event, one file per range of users' hashes.

    A slice at a time: one streaming pass over all would hold the more decoded events, the longer the log.
    """
    rows = pl.scan_parquet(events).select(USER_ID, ITEM_ID, TIMESTAMP)
    parts = -(-count // at_once)
    items, first_time, last_time = pl.Series(ITEM_ID, [], pl.String), _NEVER, -_NEVER
    for start in range(0, count, at_once):
        some = rows.slice(start, at_once).collect()
        items = pl.concat([items, some[ITEM_ID].unique()]).unique()
        times = some[TIMESTAMP].to_numpy()
        first_time, last_time = min(first_time, int(times.min())), max(last_time, int(times.max()))
        user, item = some[USER_ID].hash(21).to_numpy(), some[ITEM_ID].hash(22).to_numpy()
        words = np.stack([user, item, np.arange(start, start + len(user), dtype=np.uint64)], axis=1)
        part = bucket_of(user, parts)
        words = words[np.argsort(part.astype(np.uint16), kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=parts)).tolist()
        for number, (begin, end) in enumerate(pairwise([0, *ends])):
            if begin < end:
                with (work / f"part{number:06}").open("ab") as file:
                    file.write(words[begin:end].data)
    return _Whole(items, first_time, last_time)


def _quantiles(lengths: NDArray[np.int64]) -> dict[str, int]:
    """Return quantiles of the events per user, lower ones, where `lengths[n]` users have n events."""
    until = np.cumsum(lengths)
    places = [(int(until[-1]) - 1) * percent // 100 for percent in QUANTILES]
    found = np.searchsorted(until, places, side="right")
    return {f"p{percent}": int(length) for percent, length in zip(QUANTILES, found, strict=True)}


def write_users(
    events: Path, first_rows: NDArray[np.int64], out: Path, work: Path, at_once: int = ROWS_AT_ONCE
) -> None:
    """Write the ids of the users with events as a table, in the order of their first rows.

    Args:
        events: the canonical Parquet file of events.
        first_rows: of `measure_events`.
        out: the Parquet file to write.
        work: a directory for as many bytes as the table takes.
        at_once: events read at once.
    """
    ids, pieces = pl.scan_parquet(events).select(USER_ID), []
    for start in range(0, int(first_rows[-1]) + 1, at_once):
        low, high = np.searchsorted(first_rows, [start, start + at_once])
        pieces.append(work / f"users{start:012}.parquet")
        some = ids.slice(start, at_once).collect()[first_rows[low:high] - start]
        some.write_parquet(pieces[-1], compression="lz4")
    pl.scan_parquet(pieces).sink_parquet(out, compression="zstd")
