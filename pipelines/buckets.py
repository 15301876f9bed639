"""From events to packed histories and requests, one bucket of users at a time.

Users are ordered by a 64-bit hash, and a bucket is a range of hashes: a run of consecutive history rows. So the result
does not depend on how many buckets there are. `partition` adds a slice of the log to one file per bucket;
`prepare_bucket` is a pure function from such a file to arrays, so that a pool of processes, or anything else, may run
it. Memory is bounded by the largest bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save_file

from pipelines.mixing import mix
from pipelines.parts import Part
from pipelines.splits import TEST, TRAIN, VALID, Cuts, assign
from pipelines.transitions import PAIRS, pair_words
from recsys.columns import ACTION, ITEM_ID, ITEM_KEY, SESSION_ID, TIMESTAMP, USER_ID, VALUE
from recsys.errors import DataError
from recsys.history import side_by_side

FIRST_ROW = 2
"""Model row of item key 0: `ranking.batch.FIRST_ITEM`, repeated so that a worker need not load torch."""
BUCKET_FILE = "bucket.safetensors"
WAITING = "waiting"
KINDS = ("train", "valid", "test", WAITING)
"""Requests by split, and all that do not train: those may do so later, when a cut has moved past their end."""
USER_ROW, SESSION, POSITIVE, BUCKET = "user_row", "session", "positive", "bucket"
_EVENT = np.dtype(
    [
        (TIMESTAMP, np.int64),
        (SESSION, np.uint64),
        (USER_ROW, np.uint32),
        (ITEM_KEY, np.uint32),
        (ACTION, np.uint8),
        (POSITIVE, np.bool_),
    ]
)
"""a numbered event in a bucket's file, 26 bytes"""


@dataclass(frozen=True)
class Rule:
    """Which events are positives: those of one of `actions` (empty: any) and of a value of `min_value` at least."""

    actions: tuple[str, ...] = ()
    min_value: float | None = None


@dataclass(frozen=True)
class BucketPlan:
    """What a bucket needs to know besides its events: first history row, number of users, where periods begin."""

    first_user: int
    users: int
    cuts: Cuts


@dataclass(frozen=True)
class BucketSummary:
    """What a bucket held: events, distinct (user, item) pairs, requests and their positives by the name of `KINDS`."""

    events: int
    user_items: int
    requests: Mapping[str, int]
    positives: Mapping[str, int]


@dataclass(frozen=True)
class Sessions:
    """Requests that still know when their session ended, by (user, first moment, last moment, first event).

    `user`, `at`, `last`, `end` int64 [R]: history row, first and last moment, and the end of the history in the packed
    events. Request r's positives are the distinct item rows positive[offsets[r]] .. positive[offsets[r + 1]].
    """

    user: NDArray[np.int64]
    at: NDArray[np.int64]
    last: NDArray[np.int64]
    end: NDArray[np.int64]
    offsets: NDArray[np.int64]
    positive: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.user)

    def take(self, index: NDArray[np.int64]) -> "Sessions":
        """Return the requests at `index`, in that order."""
        where, offsets = side_by_side(self.offsets[index], np.diff(self.offsets)[index])
        return Sessions(
            self.user[index], self.at[index], self.last[index], self.end[index], offsets, self.positive[where]
        )


@dataclass(frozen=True)
class SortedEvents:
    """Events in the order of `sort_events`; users counted from the bucket's first."""

    user: NDArray[np.int64]
    time: NDArray[np.int64]
    item: NDArray[np.uint32]
    action: NDArray[np.uint8]
    session: NDArray[np.uint64]
    positive: NDArray[np.bool_]


def user_hashes(user_ids: Sequence[str]) -> NDArray[np.uint64]:
    """Return xxh64 with seed 0 of each id's UTF-8 bytes: the same on every machine and in every version."""
    return np.fromiter((xxhash.xxh64_intdigest(user.encode()) for user in user_ids), np.uint64, len(user_ids))


def bucket_of(hashes: NDArray[np.uint64], buckets: int) -> NDArray[np.uint32]:
    """Return the bucket of each hash: equal ranges of the high 32 bits."""
    return ((hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.uint32)


def numbered(
    part: Part, index: int, users: pl.DataFrame, items: pl.DataFrame, actions: Sequence[str], rule: Rule
) -> pl.LazyFrame:
    """Return a part's events with numbers for ids, a session for every event, and whether it is a positive.

    Args:
        part: the events.
        index: the part's place among the log's parts; sessions of two parts are never the same.
        users: user_id, user_row, bucket.
        items: item_id, item_key.
        actions: names of the action codes 1, 2, ...; code 0 means no action.
        rule: which events are positives.

    Raises:
        DataError: the rule wants a value, the part has none.
    """
    # An event without session is a session of its own moment. Polars' hash is fixed by its seed and its version.
    session = pl.col(TIMESTAMP).hash(2 * index + 2)
    if SESSION_ID in part.columns:
        name = pl.col(SESSION_ID)
        session = pl.when(name.is_null()).then(session).otherwise(name.hash(2 * index + 1))
    return (
        part.events.join(users.lazy().select(USER_ID, USER_ROW, BUCKET), on=USER_ID)
        .join(items.lazy().select(ITEM_ID, ITEM_KEY), on=ITEM_ID)
        .select(
            pl.col(BUCKET, USER_ROW, TIMESTAMP, ITEM_KEY),
            _positive(part, rule).alias(POSITIVE),
            _action_code(actions if ACTION in part.columns else ()).alias(ACTION),
            session.alias(SESSION),
        )
    )


def partition(events: pl.DataFrame, buckets: int, out: Path) -> None:
    """Add numbered events to the files of their buckets (`bucket_file`) in the existing directory `out`."""
    bucket = events[BUCKET].to_numpy()
    order = np.argsort(bucket.astype(np.uint16), kind="stable")
    records = np.empty(events.height, _EVENT)
    for name in records.dtype.names or ():
        records[name] = events[name].to_numpy()[order]
    ends = np.cumsum(np.bincount(bucket, minlength=buckets)).tolist()
    for number, (begin, end) in enumerate(pairwise([0, *ends])):
        if begin < end:
            with bucket_file(out, number).open("ab") as file:
                file.write(records[begin:end].data)


def bucket_file(folder: Path, bucket: int) -> Path:
    """Return where the events of a bucket lie; there is no such file if it has none."""
    return folder / f"{bucket}.events"


def _events_of(file: Path) -> pl.DataFrame:
    records = np.fromfile(file, _EVENT) if file.exists() else np.empty(0, _EVENT)
    return pl.DataFrame({name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()})


def _action_code(actions: Sequence[str]) -> pl.Expr:
    if not actions:
        return pl.lit(0, pl.UInt8)
    return pl.col(ACTION).replace_strict(actions, range(1, len(actions) + 1), default=0, return_dtype=pl.UInt8)


def _positive(part: Part, rule: Rule) -> pl.Expr:
    chosen = pl.lit(True)
    if rule.actions:
        chosen = pl.col(ACTION).is_in(rule.actions) if ACTION in part.columns else pl.lit(False)
    if rule.min_value is not None:
        if VALUE not in part.columns:
            raise DataError(
                f"{part.file}: min_value is {rule.min_value:g}, but there is no column "
                f"{VALUE!r}; it has {', '.join(part.columns)}"
            )
        chosen &= pl.col(VALUE).fill_nan(None) >= rule.min_value
    return chosen.fill_null(False)


def prepare_bucket(events: Path, out: Path, plan: BucketPlan) -> BucketSummary:
    """Turn a bucket's events into arrays in `out` (an existing directory), the same whatever the order of the rows.

    Writes bucket.safetensors: item, action, time; lengths (events per user); for each of `KINDS` {kind}_{array} with
    the arrays of `Sessions` but size for offsets, ends counted from the bucket's first event, by (at, user) and those
    that wait by user; counted_row and counted (training events by model row). Writes pairs.bin
    (`pipelines.transitions`).

    Cost: 1.5 million events take about 1 s on one core; memory is about 300 bytes per event of the bucket, half of it
    for the pairs.
    """
    log = sort_events(_events_of(events), plan.first_user)
    requests = session_requests(log)
    split, training_end = assign(plan.cuts, plan.users, requests.user, requests.at, requests.last)
    train = requests.take(np.flatnonzero(split == TRAIN))
    pair_words(train.user, train.offsets, train.positive).tofile(out / PAIRS)
    counted = np.bincount(log.item[log.time < training_end[log.user]])
    arrays: dict[str, NDArray[Any]] = {
        "item": log.item,
        "action": log.action,
        "time": log.time,
        "lengths": np.bincount(log.user, minlength=plan.users),
        "counted_row": np.flatnonzero(counted) + FIRST_ROW,
        "counted": counted[counted > 0],
    }
    kinds = {
        "train": _by_moment(requests, split == TRAIN),
        "valid": _by_moment(requests, split == VALID),
        "test": _by_moment(requests, split == TEST),
        WAITING: requests.take(np.flatnonzero(split != TRAIN)),
    }
    for name, some in kinds.items():
        arrays |= {
            f"{name}_user": some.user + plan.first_user,
            f"{name}_at": some.at,
            f"{name}_last": some.last,
            f"{name}_end": some.end,
            f"{name}_size": np.diff(some.offsets),
            f"{name}_positive": some.positive,
        }
    save_file(arrays, out / BUCKET_FILE)
    pairs = distinct(log.user.astype(np.uint64) << np.uint64(32) | log.item)
    return BucketSummary(
        len(log.item),
        len(pairs),
        {name: len(some) for name, some in kinds.items()},
        {name: len(some.positive) for name, some in kinds.items()},
    )


def _by_moment(requests: Sessions, which: NDArray[np.bool_]) -> Sessions:
    index = np.flatnonzero(which)
    return requests.take(index[np.argsort(requests.at[index], kind="stable")])


def sort_events(frame: pl.DataFrame, first_user: int) -> SortedEvents:
    """Sort numbered events by user, time, session and a hash of the line.

    Lines of one stamp have no order of their own, and a log need not keep its rows in order. Any fixed order of items
    would favour some of them wherever a window of newest events cuts through a basket: by item key, .192 of the next
    basket is found among a grocery user's newest 50 lines; by hash, as at random, .196.
    """
    line = frame[TIMESTAMP].to_numpy().view(np.uint64) ^ frame[ITEM_KEY].to_numpy().astype(np.uint64)
    keys = (USER_ROW, TIMESTAMP, SESSION, "line", ITEM_KEY, ACTION)
    frame = frame.with_columns(pl.Series("line", mix(line))).sort(*keys)
    return SortedEvents(
        user=frame[USER_ROW].to_numpy().astype(np.int64) - first_user,
        time=frame[TIMESTAMP].to_numpy(),
        item=frame[ITEM_KEY].to_numpy(),
        action=frame[ACTION].to_numpy(),
        session=frame[SESSION].to_numpy(),
        positive=frame[POSITIVE].to_numpy(),
    )


def session_requests(log: SortedEvents) -> Sessions:
    """Return every session that has a positive, with the events strictly before its first moment as history."""
    session, first, last = _number_sessions(log)
    index = np.arange(len(log.user))
    new_moment = np.ones(len(index), np.bool_)
    new_moment[1:] = (log.user[1:] != log.user[:-1]) | (log.time[1:] != log.time[:-1])
    # Another session may share the first moment and stand before this one: the history ends where the moment begins.
    end = np.maximum.accumulate(np.where(new_moment, index, 0))[first]
    pairs = distinct(session[log.positive].astype(np.uint64) << np.uint64(32) | log.item[log.positive])
    size = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=len(first))
    kept = size > 0
    first, last, end = first[kept], last[kept], end[kept]
    found = Sessions(
        user=log.user[first],
        at=log.time[first],
        last=log.time[last],
        end=end,
        offsets=np.concatenate([[0], np.cumsum(size[kept])]),
        positive=(pairs & np.uint64(0xFFFFFFFF)).astype(np.int32) + np.int32(FIRST_ROW),
    )
    # Sessions that begin together stand in the order in which they end: one that joins the training period later, when
    # a cut has moved past its end, then comes after those that were in it before.
    if ((found.user[1:] == found.user[:-1]) & (found.at[1:] == found.at[:-1])).any():
        return found.take(np.lexsort((found.last, found.at, found.user)))
    return found


def _number_sessions(log: SortedEvents) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
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


def distinct(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the distinct words, ascending. Sorts in place: five times as fast as `np.unique`."""
    words.sort()
    return words[np.concatenate([[True], words[1:] != words[:-1]])] if len(words) else words
