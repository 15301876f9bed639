"""From events to packed histories and requests, one bucket of users at a time.

Users are ordered by a 64-bit hash, and a bucket is a range of hashes: a run of consecutive history rows. So the result
does not depend on how many buckets there are. `partition` streams the log into one file per bucket; `prepare_bucket` is
a pure function from such a file to arrays, so that a pool of processes, or anything else, may run it. Memory is bounded
by the largest bucket.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pipelines.mixing import mix
from pipelines.splits import TEST, TRAIN, VALID, Cuts, assign
from pipelines.transitions import PAIRS, pair_words
from recsys.columns import ACTION, ITEM_ID, ITEM_KEY, SESSION_ID, TIMESTAMP, USER_ID

FIRST_ROW = 2
"""Model row of item key 0: `ranking.batch.FIRST_ITEM`, repeated so that a worker need not load torch."""
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}
BUCKET_FILE = "bucket.safetensors"
REQUEST_ARRAYS = ("user", "at", "end", "size", "positive")
USER_ROW, SESSION, BUCKET = "user_row", "session", "bucket"
_SCHEMA = {USER_ROW: pl.UInt32, TIMESTAMP: pl.Int64, SESSION: pl.UInt64, ITEM_KEY: pl.UInt32, ACTION: pl.UInt8}


@dataclass(frozen=True)
class BucketPlan:
    """What a bucket needs to know besides its events.

    Attributes:
        first_user: history row of its first user.
        users: number of its users.
        cuts: where the periods begin.
        positive: action codes that make an event a positive; empty means all.
        has_sessions: whether requests are sessions rather than moments.
    """

    first_user: int
    users: int
    cuts: Cuts
    positive: tuple[int, ...]
    has_sessions: bool


@dataclass(frozen=True)
class BucketSummary:
    """What a bucket held: events, distinct (user, item) pairs, straddling requests, requests by split."""

    events: int
    user_items: int
    straddling: int
    requests: dict[str, int]


def user_hashes(user_ids: Sequence[str]) -> NDArray[np.uint64]:
    """Give xxh64 with seed 0 of each id's UTF-8 bytes: the same on every machine and in every version."""
    return np.fromiter((xxhash.xxh64_intdigest(user.encode()) for user in user_ids), np.uint64, len(user_ids))


def bucket_of(hashes: NDArray[np.uint64], buckets: int) -> NDArray[np.uint32]:
    """Give the bucket of each hash: equal ranges of the high 32 bits."""
    return ((hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint32)


def partition(
    events: pl.LazyFrame, users: pl.DataFrame, items: pl.DataFrame, actions: Sequence[str], out: Path
) -> None:
    """Stream the log into `out`/bucket=b/*.parquet with numbers for ids.

    Args:
        events: the canonical log.
        users: user_id, user_row, bucket.
        items: item_id, item_key.
        actions: names of the action codes 1, 2, ...; code 0 means no action.
        out: an existing directory.

    Cost: streaming; 20 million events into 80 buckets take 6 CPU seconds and 1.5 GB at most.
    """
    columns = events.collect_schema().names()
    selected = [BUCKET, USER_ROW, pl.col(TIMESTAMP), ITEM_KEY, _action_code(actions if ACTION in columns else ())]
    if SESSION_ID in columns:
        # An event without session is a session of its own moment. Polars' hash serves to group within one run only.
        session, moment = pl.col(SESSION_ID), pl.col(TIMESTAMP)
        selected.append(pl.when(session.is_null()).then(moment.hash(2)).otherwise(session.hash(1)).alias(SESSION))
    (
        events.join(users.lazy().select(USER_ID, USER_ROW, BUCKET), on=USER_ID)
        .join(items.lazy().select(ITEM_ID, ITEM_KEY), on=ITEM_ID)
        .select(selected)
        .sink_parquet(pl.PartitionBy(out, key=BUCKET, include_key=False), mkdir=True, compression="lz4")
    )


def _action_code(actions: Sequence[str]) -> pl.Expr:
    if not actions:
        return pl.lit(0, pl.UInt8).alias(ACTION)
    codes = range(1, len(actions) + 1)
    return pl.col(ACTION).replace_strict(actions, codes, default=0, return_dtype=pl.UInt8).alias(ACTION)


def prepare_bucket(parts: Sequence[Path], out: Path, plan: BucketPlan) -> BucketSummary:
    """Turn a bucket's events into arrays in `out` (an existing directory), the same whatever the order of the rows.

    Writes bucket.safetensors: item, action, time; lengths (events per user); per split {split}_{array} for the arrays
    user, at, end (within the bucket), size, positive; counted_row and counted (training events by model row). Writes
    pairs.bin (`pipelines.transitions`).

    Cost: 1.5 million events take about 1 s on one core; memory is about 300 bytes per event of the bucket, half of it
    for the pairs.
    """
    log = _read(parts, plan)
    requests = _requests(log, plan)
    split, training_end = assign(plan.cuts, plan.users, requests.user, requests.at, requests.last)
    counted = np.bincount(log.item[log.time < training_end[log.user]])
    arrays: dict[str, NDArray[Any]] = {
        "item": log.item,
        "action": log.action,
        "time": log.time,
        "lengths": np.bincount(log.user, minlength=plan.users),
        "counted_row": np.flatnonzero(counted) + FIRST_ROW,
        "counted": counted[counted > 0],
    }
    sizes = {}
    for name, code in SPLITS.items():
        chosen = requests.where(split == code)
        sizes[name] = len(chosen.user)
        columns: tuple[NDArray[Any], ...]
        columns = (chosen.user + plan.first_user, chosen.at, chosen.end, np.diff(chosen.offsets), chosen.positive)
        arrays |= {f"{name}_{array}": values for array, values in zip(REQUEST_ARRAYS, columns, strict=True)}
        if code == TRAIN:
            pair_words(chosen.user, chosen.offsets, chosen.positive).tofile(out / PAIRS)
    save_file(arrays, out / BUCKET_FILE)
    distinct = _distinct(log.user.astype(np.uint64) << np.uint64(32) | log.item)
    return BucketSummary(len(log.item), len(distinct), int((split > TEST).sum()), sizes)


@dataclass(frozen=True)
class _Log:
    """Events in the order of `_read`; users counted from the bucket's first."""

    user: NDArray[np.int64]
    time: NDArray[np.int64]
    item: NDArray[np.uint32]
    action: NDArray[np.uint8]
    session: NDArray[np.uint64]


@dataclass(frozen=True)
class _BucketRequests:
    """Requests by (user, first moment, first event); `end` counts from the bucket's first event."""

    user: NDArray[np.int64]
    at: NDArray[np.int64]
    last: NDArray[np.int64]
    end: NDArray[np.int64]
    offsets: NDArray[np.int64]
    positive: NDArray[np.int32]

    def where(self, mask: NDArray[np.bool_]) -> "_BucketRequests":
        size = np.diff(self.offsets)
        offsets = np.concatenate([[0], np.cumsum(size[mask])])
        positive = self.positive[np.repeat(mask, size)]
        return _BucketRequests(self.user[mask], self.at[mask], self.last[mask], self.end[mask], offsets, positive)


def _read(parts: Sequence[Path], plan: BucketPlan) -> _Log:
    """Read and sort a bucket by user, time, session and a hash of the line.

    Lines of one stamp have no order of their own, and a log need not keep its rows in order. Any fixed order of items
    would favour some of them wherever a window of newest events cuts through a basket: by item key, .192 of the next
    basket is found among a grocery user's newest 50 lines; by hash, as at random, .196.
    """
    keys = [USER_ROW, TIMESTAMP, *([SESSION] if plan.has_sessions else [])]
    columns = [*keys, ITEM_KEY, ACTION]
    frame = pl.read_parquet(list(parts), columns=columns) if parts else pl.DataFrame(schema=_SCHEMA)
    line = frame[TIMESTAMP].to_numpy().view(np.uint64) ^ frame[ITEM_KEY].to_numpy().astype(np.uint64)
    frame = frame.with_columns(pl.Series("line", mix(line))).sort(*keys, "line", ITEM_KEY, ACTION)
    time = frame[TIMESTAMP].to_numpy()
    return _Log(
        user=frame[USER_ROW].to_numpy().astype(np.int64) - plan.first_user,
        time=time,
        item=frame[ITEM_KEY].to_numpy(),
        action=frame[ACTION].to_numpy(),
        session=frame[SESSION].to_numpy() if plan.has_sessions else time.view(np.uint64),
    )


def _requests(log: _Log, plan: BucketPlan) -> _BucketRequests:
    """Give every session that has a positive, with the events strictly before its first moment as history."""
    session, first, last = _sessions(log)
    index = np.arange(len(log.user))
    new_moment = np.ones(len(index), np.bool_)
    new_moment[1:] = (log.user[1:] != log.user[:-1]) | (log.time[1:] != log.time[:-1])
    # Another session may share the first moment and stand before this one: the history ends where the moment begins.
    end = np.maximum.accumulate(np.where(new_moment, index, 0))[first]
    positive = np.isin(log.action, plan.positive) if plan.positive else np.ones(len(index), np.bool_)
    pairs = _distinct(session[positive].astype(np.uint64) << np.uint64(32) | log.item[positive])
    size = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(first))
    kept = size > 0
    first, last, end = first[kept], last[kept], end[kept]
    return _BucketRequests(
        user=log.user[first],
        at=log.time[first],
        last=log.time[last],
        end=end,
        offsets=np.concatenate([[0], np.cumsum(size[kept])]),
        positive=(pairs & np.uint64(0xFFFFFFFF)).astype(np.int32) + np.int32(FIRST_ROW),
    )


def _sessions(log: _Log) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Number the (user, session) pairs by their first event; give each event's number, and first and last events."""
    if not len(log.user):
        return log.user, log.user, log.user
    changes = (log.user[1:] != log.user[:-1]) | (log.session[1:] != log.session[:-1])
    start = np.concatenate([[0], np.flatnonzero(changes) + 1])
    length = np.diff(np.append(start, len(log.user)))
    # Runs of one session may be apart, with other events between them.
    name = log.session[start] ^ (log.user[start].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    _, first_run, inverse = np.unique(name, return_index=True, return_inverse=True)
    order = np.argsort(first_run)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    of_run = number[inverse]
    last = np.empty(len(order), np.int64)
    last[of_run] = start + length - 1  # runs ascend, so the last one of a session is what stays
    return np.repeat(of_run, length), start[first_run[order]], last


def _distinct(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Give the distinct words, ascending. Sorts in place: five times as fast as `np.unique`."""
    words.sort()
    return words[np.concatenate([[True], words[1:] != words[:-1]])] if len(words) else words
