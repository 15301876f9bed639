"""What every store of live histories shares: a view of the event log over the published snapshot."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recsys.errors import StoreError
from recsys.history import Events
from recsys.log_format import Record
from recsys.stores import Encoder, Event, HistoryReader, LogMark, Tombstone

MAX_USER_BYTES = 480
"""Longest user id in UTF-8 bytes; LMDB keys end at 511."""

HISTORY_EVENTS = 20_000
"""Newest posted events kept of a user by default; the recommender uses the newest 10,000 of a history."""

APPLY_EVENTS = 100_000
"""Events held in memory at once while a log is applied."""

RECORD = np.dtype([("time", "<i8"), ("item", "<u4"), ("action", "u1")])


class Observed(NamedTuple):
    """A history and what it was read from, so that it can be rebuilt later.

    `position` is that of the event log up to which the view had applied events; `base` the id of the snapshot.
    """

    events: Events | None
    position: int
    base: str


class Snapshot(HistoryReader, Protocol):
    """The published base under the live events."""

    @property
    def id(self) -> str:
        """What tells it from every other snapshot."""
        ...

    def mark(self, log: str) -> LogMark:
        """Say what it contains of an event log."""
        ...

    def users(self, limit: int) -> list[str]:
        """Return the ids of the first `limit` users."""
        ...


class ReplayableLog(Protocol):
    """What a view needs of the event log."""

    @property
    def id(self) -> str:
        """Names this log for ever."""
        ...

    @property
    def end(self) -> int:
        """Position after the last known record."""
        ...

    def refresh(self) -> int:
        """Take note of what other processes have written; gives the new end."""
        ...

    def replay(self, start: int = 0) -> Iterator[Record]:
        """Return the events from a position to the end."""
        ...

    def copy_tombstone(self, tombstone: Tombstone) -> None:
        """Write a tombstone of another log, unless it is there already."""
        ...


class LiveHistories(HistoryReader, Protocol):
    """A store of live histories, as the service uses it; every method raises `StoreError` while it is unavailable."""

    kind: str

    def observe(self, user_id: str) -> Observed:
        """Return the user's history with what it was read from."""
        ...

    def parts(self, user_id: str) -> tuple[Events | None, Events | None]:
        """Return what the snapshot and what the log know of a user, None each for nothing."""
        ...

    def users(self, limit: int) -> list[str]:
        """Return up to `limit` user ids: those with posted events first, then users of the snapshot."""
        ...

    def follow(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Apply what the log holds beyond this view; gives the number of entries applied."""
        ...

    def learn(self, log: ReplayableLog, encoder: Encoder) -> None:
        """Give the events whose items were unknown the keys that a new bundle has for them."""
        ...

    def before_append(self, log: ReplayableLog) -> None:
        """Bring into the log, before events are written to it, what has to stand before them."""
        ...

    @property
    def position(self) -> int:
        """Log position up to which events have been applied."""
        ...

    @property
    def unknown_events(self) -> int:
        """Number of events whose item was unknown when they were applied."""
        ...

    def close(self) -> None:
        """Close the store; the object can't be used afterwards."""
        ...


def batches(
    log: ReplayableLog, position: int, mark: LogMark | None, size: int = APPLY_EVENTS
) -> Iterator[list[Record]]:
    """Yield what a view at a position has to apply, at most `size` entries at a time.

    Args:
        log: the event log.
        position: of the view; of a new one, where the snapshot's part of the log ends.
        mark: of the snapshot if the view is new: the events that the snapshot left out come first.
        size: most entries of a batch.
    """
    if mark is not None and mark.left_out:
        late = [next(iter(log.replay(start))) for start in mark.left_out]
        for start in range(0, len(late), size):
            yield [record._replace(end=position) for record in late[start : start + size]]
    records = log.replay(position)
    while batch := list(islice(records, size)):
        yield batch


def packed(events: Events) -> NDArray[np.void]:
    """Return events as records."""
    rows = np.empty(len(events), RECORD)
    rows["item"], rows["action"], rows["time"] = events.item, events.action, events.time
    return rows


def unpacked(rows: NDArray[np.void]) -> Events:
    """Return records as events."""
    return Events(*(np.ascontiguousarray(rows[name]) for name in ("item", "action", "time")))


def by_user(batch: Iterable[Record]) -> tuple[list[str], dict[str, list[Event]]]:
    """Return the users a batch forgets, each once, and the events of each user after their last tombstone."""
    forgotten: dict[str, None] = {}
    events: dict[str, list[Event]] = {}
    for entry in (record.event for record in batch):
        if isinstance(entry, Tombstone):
            events.pop(entry.user_id, None)
            forgotten[entry.user_id] = None
        else:
            events.setdefault(entry.user_id, []).append(entry)
    return list(forgotten), events


def joined(base: Events | None, posted: Events | None) -> Events | None:
    """Return a whole history, or None if nothing is known."""
    if base is None or posted is None:
        return posted if base is None else base
    return Events.concatenate(base, posted)


def unavailable(kind: str, error: Exception) -> StoreError:
    """Return the error of a store that is unavailable."""
    return StoreError(f"the {kind} history store is unavailable ({type(error).__name__}: {error})")
