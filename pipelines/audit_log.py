"""Checks against the log a set was made from: every event once, and every request a session in its split.

The log is read again and its sessions are put together in another way than `prepare` does, a run of users at a time, so
that memory is bounded whatever the log's length. What an id, a session and a positive are is asked of
`pipelines.buckets.numbered`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines import splits
from pipelines.audit_period import Period
from pipelines.audit_record import Check, counted
from pipelines.audit_requests import SPLITS, AllRequests, Names, basket_names, item_names, moment_names, user_slices
from pipelines.buckets import BUCKET, POSITIVE, SESSION, USER_ROW, numbered
from pipelines.mixing import mix
from pipelines.parts import Part, source_of
from pipelines.prepared import PreparedSet
from pipelines.settings import PrepareConfig
from pipelines.write import rule_of
from ranking.batch import rows_of
from recsys.columns import ACTION, ITEM_ID, ITEM_KEY, TIMESTAMP, USER_ID

EVENTS_AT_ONCE = 5_000_000
NAME, AT, LAST, BASKET = "name", "at", "last", "basket"
CODES = {"train": splits.TRAIN, "valid": splits.VALID, "test": splits.TEST}


@dataclass(frozen=True)
class LogSessions:
    """All sessions of the log with a positive, by (user, first moment): history row, moments and name of the basket."""

    user: NDArray[np.int64]
    at: NDArray[np.int64]
    last: NDArray[np.int64]
    basket: Names


@dataclass(frozen=True)
class LogRead:
    """What one pass over the log found.

    Attributes:
        sessions: those with a positive.
        unlike: history rows whose events in the set are not those of the log.
        events: events of the log whose user and item the set knows.
        unknown: events whose user or item it does not know.
    """

    sessions: LogSessions
    unlike: NDArray[np.int64]
    events: int
    unknown: int


def of_this_set(prepared: PreparedSet, parts: Sequence[Part]) -> bool:
    """Whether these parts are the log the set was made from."""
    source = prepared.manifest.get("source")
    return bool(parts) and isinstance(source, dict) and source == source_of([part.record for part in parts])


def read_log(prepared: PreparedSet, parts: Sequence[Part], config: PrepareConfig) -> LogRead:
    """Read the log once per `EVENTS_AT_ONCE` events: compare its events with the histories and collect its sessions."""
    people = prepared.users.select(USER_ID).with_row_index(USER_ROW).with_columns(pl.lit(0).alias(BUCKET))
    items, actions = prepared.catalogue.select(ITEM_ID, ITEM_KEY), prepared.manifest["actions"]
    found, unlike, known = [], [], 0
    for begin, end in user_slices(np.asarray(prepared.histories.offsets), EVENTS_AT_ONCE):
        some = people.slice(begin, end - begin)
        events = [numbered(part, i, some, items, actions, rule_of(config)) for i, part in enumerate(parts)]
        frame = pl.concat(events).drop(BUCKET).collect(engine="streaming").sort(USER_ROW)
        known += frame.height
        unlike.append(_unlike(prepared, frame, begin, end))
        found.append(_sessions(frame, prepared.key_to_row))
    sessions = pl.concat(found).sort(USER_ROW, AT, LAST, BASKET)
    columns = (sessions[name].to_numpy() for name in (AT, LAST, BASKET))
    return LogRead(
        LogSessions(sessions[USER_ROW].to_numpy().astype(np.int64), *columns),
        np.concatenate(unlike),
        known,
        sum(_events(part) for part in parts) - known,
    )


def _events(part: Part) -> int:
    """Count a part's events without those of users it hides."""
    return int(part.events.select(pl.len()).collect().item()) if part.hidden else part.record.events


def _unlike(prepared: PreparedSet, frame: pl.DataFrame, begin: int, end: int) -> NDArray[np.int64]:
    """Return the users first..last whose events are not the same in log and histories; their order does not matter."""
    offsets, events = np.asarray(prepared.histories.offsets), prepared.histories.events
    low, high = int(offsets[begin]), int(offsets[end])
    stored = _event_names(*(np.asarray(part[low:high]) for part in (events.item, events.action, events.time)))
    logged = _event_names(*(frame[name].to_numpy() for name in (ITEM_KEY, ACTION, TIMESTAMP)))
    ends = np.searchsorted(frame[USER_ROW].to_numpy(), np.arange(begin, end + 1))
    mine, theirs = _sums(stored, offsets[begin : end + 1] - low), _sums(logged, ends)
    return np.flatnonzero((mine != theirs) | (np.diff(ends) != np.diff(offsets[begin : end + 1]))) + begin


def _event_names(item: NDArray[Any], action: NDArray[Any], time: NDArray[Any]) -> Names:
    return mix(mix(np.ascontiguousarray(time).view(np.uint64)) ^ (item.astype(np.uint64) << np.uint64(8) | action))


def _sums(names: Names, offsets: NDArray[np.int64]) -> Names:
    """Sum the names of each run, modulo 2^64."""
    running = np.concatenate([np.zeros(1, np.uint64), np.cumsum(names)])
    sums: Names = running[offsets[1:]] - running[offsets[:-1]]
    return sums


def _sessions(frame: pl.DataFrame, key_to_row: NDArray[np.int32]) -> pl.DataFrame:
    """Return user, first and last moment and the basket's name of every session with a positive."""
    names = item_names(rows_of(frame[ITEM_KEY].to_numpy(), key_to_row))
    moments = frame.group_by(USER_ROW, SESSION).agg(
        pl.col(TIMESTAMP).min().alias(AT), pl.col(TIMESTAMP).max().alias(LAST)
    )
    baskets = (
        frame.select(USER_ROW, SESSION, POSITIVE, pl.Series(NAME, names))
        .filter(POSITIVE)
        .unique([USER_ROW, SESSION, NAME])
        .group_by(USER_ROW, SESSION)
        .agg(pl.col(NAME).sum().alias(BASKET))
    )
    return moments.join(baskets, on=[USER_ROW, SESSION]).select(USER_ROW, AT, LAST, BASKET)


def period_of_log(prepared: PreparedSet, cuts: splits.Cuts, sessions: LogSessions) -> Period:
    """Return the training period as the log tells it: under `last_request` it ends at the newest session but one."""
    users = len(prepared.histories)
    if cuts.kind == "time":
        return Period(cuts, np.full(users, cuts.valid, np.int64))
    stop = np.searchsorted(sessions.user, np.arange(users), side="right")
    count = np.bincount(sessions.user, minlength=users)
    ends = np.full(users, splits.NEVER, np.int64)
    for sessions_at_least in (1, 2):
        some = count >= sessions_at_least
        ends[some] = sessions.at[stop[some] - sessions_at_least]
    return Period(cuts, ends)


def log_checks(prepared: PreparedSet, requests: AllRequests, read: LogRead, period: Period) -> list[Check]:
    """Compare histories and requests with the log."""
    found = f"{read.events:,} events of the log, each once in its user's history"
    if len(read.unlike):
        user = prepared.users[USER_ID][int(read.unlike[0])]
        found = f"not those of the log: the events of {counted(len(read.unlike), 'user')}, e.g. of user {user!r}"
    elif read.unknown:
        found = f"of users or items the set does not know: {counted(read.unknown, 'event')} of the log"
    wrong = _unlike_sessions(requests, read.sessions, period)
    total = sum(len(some) for some in requests.values())
    return [
        Check("log_events", not len(read.unlike) and not read.unknown, found, "the log's events, no more and no less"),
        Check(
            "log_requests",
            not wrong,
            "; ".join(wrong) or f"{total:,} requests, each a session of the log that lies in its split as a whole",
            "each request a session of the log, training the sessions that end before the cut",
        ),
    ]


def _unlike_sessions(requests: AllRequests, sessions: LogSessions, period: Period) -> list[str]:
    """Say which requests are no sessions of the log, or not in the split they belong to.

    Two sessions of one user at one moment have no order, so under `last_request` either may be the newest: requests are
    compared with all sessions by basket, and with those of their split by moment.
    """
    moments = moment_names(sessions.user, sessions.at)
    whole = mix(moments ^ mix(sessions.basket))
    stored = {split: moment_names(some.user, some.at) for split, some in requests.items()}
    known = [mix(stored[split] ^ mix(basket_names(some))) for split, some in requests.items()]
    wrong = []
    if extra := _more_often(np.concatenate(known), whole):
        wrong.append(f"no session of the log of their own: {counted(extra, 'request')}")
    code, _ = splits.assign(period.cuts, len(period.ends), sessions.user, sessions.at, sessions.last)
    for split in SPLITS:
        belong = moments[code == CODES[split]]
        if extra := _more_often(stored[split], belong):
            wrong.append(f"sessions that do not lie as a whole in their split: {counted(extra, f'{split} request')}")
        if split == "train" and (missing := _more_often(belong, stored[split])):
            wrong.append(f"missing: {counted(missing, 'training session')}")
    return wrong


def _more_often(names: Names, others: Names) -> int:
    """Count the names that occur more often than among the others."""
    distinct, inverse = np.unique(np.concatenate([names, others]), return_inverse=True)
    mine = np.bincount(inverse[: len(names)], minlength=len(distinct))
    theirs = np.bincount(inverse[len(names) :], minlength=len(distinct))
    return int(np.maximum(mine - theirs, 0).sum())
