"""What the request path asks of the state under it; `serving/` holds the implementations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
    value: float = 0.0
    stamped: bool = False


@dataclass(frozen=True)
class Tombstone:
    """A user is forgotten: what the snapshot and the log before this entry know of the user counts no longer."""

    event_id: str
    user_id: str


class HistoryReader(Protocol):
    """Read side of the live histories: all that recommending needs."""

    def read(self, user_id: str) -> Events | None:
        """Give the user's history, oldest first, or None if the user is unknown."""
        ...


class HistoryStore(HistoryReader, Protocol):
    """A rebuildable view of the event log over a published snapshot."""

    def append(self, user_id: str, events: Events) -> None:
        """Add events to a user's history, keeping the order of time; visible to the next `read` in every process."""
        ...

    def users(self, limit: int) -> list[str]:
        """Give up to `limit` known user ids."""
        ...


class EventLog(Protocol):
    """The truth: append-only, durable before `append` returns, idempotent by event id."""

    def append(self, events: Sequence[Event]) -> list[Verdict]:
        """Write durably the events whose id is not in the window yet; says of each what became of it."""
        ...

    def forget(self, user_id: str) -> None:
        """Write durably that a user is forgotten; events written later count again."""
        ...
