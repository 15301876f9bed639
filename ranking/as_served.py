"""Histories as they were when an answer was made: rebuilt from the snapshot and the event log, up to a position."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ranking.snapshot import SnapshotReader
from recsys.history import Events
from recsys.log_format import LogReader
from recsys.request_log import LoggedRequest
from recsys.stores import Encoder, Event, HistoryReader, Tombstone


@dataclass
class _User:
    """What one user's history is made of."""

    base: Events | None
    posted: Events = field(default_factory=Events.empty)
    fresh: list[Event] = field(default_factory=list)

    def history(self, encoder: Encoder) -> Events | None:
        if self.fresh:
            # Equal times keep the order of arrival, as in the live view.
            self.posted = Events.concatenate(self.posted, encoder.events(self.fresh))
            self.fresh = []
        if not len(self.posted):
            return self.base
        return self.posted if self.base is None else Events.concatenate(self.base, self.posted)


def forgotten_users(log: LogReader, start: int = 0) -> dict[str, int]:
    """Return the users with a tombstone at or after a position, each with the position after the last one."""
    return {record.event.user_id: record.end for record in log.replay(start) if isinstance(record.event, Tombstone)}


def can_rebuild(request: LoggedRequest, snapshot: SnapshotReader, log: LogReader, champion: str) -> bool:
    """Whether snapshot, log and item keys at hand are those that an answer was made from."""
    known = (request.snapshot, request.log, request.champion) == (snapshot.id, log.id, champion)
    return known and request.position >= 0 and request.history != ""


def as_served(
    requests: Sequence[LoggedRequest], snapshot: SnapshotReader, log: LogReader, encoder: Encoder
) -> Iterator[tuple[LoggedRequest, Events | None]]:
    """Yield every request with its user's history as it was, None for nothing; in the order of log positions.

    Args:
        requests: those that `can_rebuild`.
        snapshot: the one they were served over.
        log: the event log they were served over.
        encoder: of the bundle that gave the live histories their item keys.

    Cost: one pass over the log; memory of the histories of the users asked for.
    """
    mark = snapshot.mark(log.id)
    users = {request.user_id: _User(snapshot.read(request.user_id)) for request in requests}
    for start in mark.left_out:
        _apply(users, next(iter(log.replay(start))).event)
    waiting = sorted(requests, key=lambda request: request.position)
    done = 0
    for record in log.replay(mark.position):
        while done < len(waiting) and waiting[done].position < record.end:
            yield waiting[done], users[waiting[done].user_id].history(encoder)
            done += 1
        if done == len(waiting):
            return
        _apply(users, record.event)
    for request in waiting[done:]:
        yield request, users[request.user_id].history(encoder)


def _apply(users: dict[str, _User], entry: Event | Tombstone) -> None:
    if entry.user_id not in users:
        return
    if isinstance(entry, Tombstone):
        users[entry.user_id] = _User(None)
    else:
        users[entry.user_id].fresh.append(entry)


def forgotten_since(state: Path, snapshot: SnapshotReader) -> frozenset[str]:
    """Return the users of a service who asked to be forgotten after what a snapshot contains of its log."""
    if not (state / "log" / "id").exists():
        return frozenset()
    log = LogReader(state / "log")
    return frozenset(forgotten_users(log, snapshot.mark(log.id).position))


class Remembered:
    """Histories without the users who were forgotten since they were published."""

    def __init__(self, histories: HistoryReader, hidden: Iterable[str]) -> None:
        self._histories = histories
        self._hidden = frozenset(hidden)

    def read(self, user_id: str) -> Events | None:
        """Return the user's history, None if the user is unknown or forgotten."""
        return None if user_id in self._hidden else self._histories.read(user_id)
