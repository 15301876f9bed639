"""The state under the service: the event log, the live histories that follow it, and the clock that goes with them."""

import logging
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from ranking.users import MAX_MOMENT
from recsys.errors import DataError, RequestError, StoreError
from recsys.history import DAY, POSITIONS
from recsys.messages import EventIn
from recsys.stores import Encoder, Event
from serving.event_log import STEP_BACK, SegmentLog
from serving.replies import EventLogInfo, ForgottenResponse, HistoryStoreInfo
from serving.telemetry import Telemetry
from serving.view import MAX_USER_BYTES, LiveHistories

MAX_FUTURE = DAY
"""Microseconds an event may be dated ahead of the service's clock; one further ahead is refused, as its unit or its
sender's clock is wrong. One dated less far ahead is kept, and not used by requests whose moment is not later."""

RETRY_SECONDS = 1.0
"""How long what was put off waits before it is tried again."""

logger = logging.getLogger(__name__)


class State:
    """An event log and its view, which may be away for a while.

    Args:
        log: the event log.
        store: the live histories.
        telemetry: where counts go.
        clock: gives now in microseconds UTC.
    """

    def __init__(self, log: SegmentLog, store: LiveHistories, telemetry: Telemetry, clock: Callable[[], int]) -> None:
        self.log = log
        self.store = store
        self.clock = clock
        self._telemetry = telemetry
        self._behind: Literal["", "follow", "learn"] = ""
        self._retry = 0.0

    def now(self) -> int:
        """Return the moment, later than all that the service gave to events, if the clock has not been set back far.

        So the very next request uses an event, also within its microsecond and after a small step back of the clock.
        """
        now, newest = self.clock(), self.log.newest_stamp
        return newest + 1 if 0 <= newest - now <= STEP_BACK else now

    def record(self, posted: Sequence[EventIn], encoder: Encoder) -> list[tuple[Event, str]]:
        """Write events durably and make them part of their users' histories; gives each with its verdict.

        Raises:
            RequestError: a user id too long, or a time out of range; 503 if the log takes nothing, as on a full disk;
                nothing is written then.
        """
        now = self.now()
        events = [_event(one, position, now) for position, one in enumerate(posted)]
        with _durably("the events"):
            try:
                self.store.before_append(self.log)
            except StoreError as error:
                self._put_off("tombstones", error)
            taken = iter(self.log.append([event for event in events if event.time - now <= MAX_FUTURE]))
        self.follow(encoder)
        return [(event, next(taken) if event.time - now <= MAX_FUTURE else "refused_future") for event in events]

    def forget(self, user_id: str, encoder: Encoder) -> ForgottenResponse:
        """Forget a user, durably, known or not: who only asked may stand in the request log.

        Raises:
            StoreError: the store is away.
            RequestError: 503 if the log cannot be written.
        """
        if len(user_id.encode()) > MAX_USER_BYTES:
            raise RequestError(422, "validation", f"user_id: more than {MAX_USER_BYTES} bytes in UTF-8; no such user")
        self.log.refresh()
        self.store.follow(self.log, encoder)
        snapshot, posted = self.store.parts(user_id)
        with _durably("the tombstone"):
            position = self.log.forget(user_id)
        self.store.follow(self.log, encoder)
        return ForgottenResponse(
            user_id=user_id,
            snapshot_events=0 if snapshot is None else len(snapshot),
            posted_events=0 if posted is None else len(posted),
            position=position,
            erased=["live histories"],
            hidden=["event log", "request log", "online comparison", "published snapshot", "canonical log"],
        )

    def follow(self, encoder: Encoder, learn: bool = False) -> None:
        """Apply what the log holds beyond the view; `learn` when a new bundle may know items that were unknown.

        Where the store is away it is put off: the log has the events, and `catch_up` brings them into the view.
        """
        learn = learn or self._behind == "learn"
        try:
            (self.store.learn if learn else self.store.follow)(self.log, encoder)
        except StoreError as error:
            self._behind = "learn" if learn else "follow"
            self._retry = time.monotonic() + RETRY_SECONDS
            self._put_off("history", error)
        else:
            if learn or self._behind != "learn":  # another thread's may have been put off meanwhile
                self._behind = ""

    def catch_up(self, encoder: Encoder) -> bool:
        """Try again, once a second, what was put off; gives whether the view has all that the log has."""
        if self._behind and time.monotonic() >= self._retry:
            self.follow(encoder)
        return not self._behind

    def missed(self) -> None:
        """Take note that a history could not be read: where the store comes back empty, it has to be filled first."""
        self._behind = self._behind or "follow"

    def log_info(self) -> EventLogInfo:
        """Say how posted events are kept."""
        tails, cut = self.log.recovered()
        return EventLogInfo(
            id=self.log.id,
            durability=self.log.durability,
            window=self.log.window,
            end=self.log.end,
            recovered_tails=tails,
            recovered_bytes=cut,
        )

    def store_info(self) -> HistoryStoreInfo:
        """Say what histories are read from."""
        try:
            position, unknown = self.store.position, self.store.unknown_events
        except StoreError:
            return HistoryStoreInfo(kind=self.store.kind, available=False, position=None, unknown_events=None)
        return HistoryStoreInfo(kind=self.store.kind, available=True, position=position, unknown_events=unknown)

    def close(self) -> None:
        """Close log and store."""
        self.store.close()
        self.log.close()

    def _put_off(self, stage: str, error: StoreError) -> None:
        self._telemetry.degraded(stage)
        logger.warning("%s is put off: %s", stage, error)


def machine_clock() -> int:
    """Return now in microseconds UTC."""
    return time.time_ns() // 1000


def position_clock(newest: int, log: SegmentLog) -> Callable[[], int]:
    """Return the clock of a service over a log that knows only order: one step beyond its newest position.

    The time of day has no meaning among positions. What is posted goes on where the log ends; events of the log that
    were stamped with a time of day are of another service, and never used.

    Args:
        newest: position of the snapshot's newest event.
        log: whose events other processes of the service append to as well.
    """
    if log.newest_stamp >= POSITIONS:
        logger.warning("%s: holds events stamped by the time of day; over positions they are not used", log.directory)

    def now() -> int:
        try:
            if log.behind():
                log.refresh()
        except (OSError, DataError) as error:  # whoever posts is told
            logger.warning("%s: cannot be read on (%s)", log.directory, error)
        return max(newest, log.newest_position) + 1

    return now


@contextmanager
def _durably(what: str) -> Iterator[None]:
    """Make an error of the disk a refusal: nothing of it was taken."""
    try:
        yield
    except OSError as error:
        logger.exception("the event log cannot be written")
        reason = f"{what} cannot be made durable ({error.strerror}), so nothing is taken; send it again"
        raise RequestError(503, "log_unavailable", reason) from error


def _event(posted: EventIn, position: int, now: int) -> Event:
    """Return the event of a post, with an id and a time."""
    if len(posted.user_id.encode()) > MAX_USER_BYTES:
        raise RequestError(
            422,
            "validation",
            f"events.{position}.user_id: more than {MAX_USER_BYTES} bytes in UTF-8; send a shorter id",
        )
    at = now if posted.timestamp is None else posted.timestamp
    if abs(at) > MAX_MOMENT:
        raise RequestError(
            422, "validation", f"events.{position}.timestamp: {at} is no moment in microseconds since 1970"
        )
    return Event(
        event_id=posted.event_id or uuid.uuid4().hex,
        user_id=posted.user_id,
        item_id=posted.item_id,
        time=at,
        action=posted.action,
        value=posted.value,
        stamped=posted.timestamp is None,
    )
