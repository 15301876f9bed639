"""What the request path asks of the state under it; `serving/` holds the implementations."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from recsys.history import Events

Verdict = Literal["accepted", "duplicate", "conflict"]
"""What the log did with an event: written; already there; refused, as its id belongs to a different event."""


@dataclass(frozen=True)
class Event:
    """One thing that happened: outside ids as strings, time in microseconds UTC.

    `event_id` makes a repeat of the same post harmless; an empty one is replaced by the log with a fresh id. `stamped`
    says that the service gave the time, as the post had none: a repeat of it has another time and is the same event.
    """

    event_id: str
    user_id: str
    item_id: str
    time: int
    action: str = ""
    value: float | None = None
    stamped: bool = False


@dataclass(frozen=True)
class Tombstone:
    """A user is forgotten: what the snapshot and the log before this entry know of the user counts no longer."""

    event_id: str
    user_id: str


@dataclass(frozen=True)
class LogMark:
    """What a published snapshot contains of an event log, so that nothing counts twice over it.

    Attributes:
        log: id of the log.
        position: all entries before it are contained, with tombstones honoured.
        left_out: positions of entries before it that are not: events that came too late for their place in training.
    """

    log: str
    position: int = 0
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """How outside names become the numbers of a history: item id -> item key, action -> code."""

    key_of: Callable[[str], int]
    action_of: Callable[[str], int]

    def events(self, events: Iterable[Event]) -> Events:
        """Return packed events in the order given; an item that the catalogue lacks is `UNKNOWN_KEY`."""
        rows = [(self.key_of(event.item_id), self.action_of(event.action), event.time) for event in events]
        item, action, time = zip(*rows, strict=True) if rows else ((), (), ())
        return Events(np.array(item, np.uint32), np.array(action, np.uint8), np.array(time, np.int64))


class HistoryReader(Protocol):
    """Read side of the live histories: all that recommending needs."""

    def read(self, user_id: str) -> Events | None:
        """Return the user's history, oldest first, or None if the user is unknown."""
        ...
