"""Who asks: the events of a request's user that lie strictly before its moment, stored or sent along."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranking.batch import rows_of
from ranking.bundle import Bundle
from ranking.ladder import Ladder
from recsys.errors import RequestError
from recsys.history import Events
from recsys.messages import InlineEvent
from recsys.stores import HistoryReader

MAX_MOMENT = 2**61
"""Moments beyond this (the year 75,000) or before its negative are refused."""


@dataclass(frozen=True)
class User:
    """What is known of the user of one request.

    Attributes:
        events: strictly before `at`, newest last.
        rows: int32 [n], model rows of the events.
        at: moment of the request, microseconds UTC.
        user_id: whose stored history it is; None for one that was sent along.
    """

    events: Events
    rows: NDArray[np.int32]
    at: int
    user_id: str | None

    @property
    def known(self) -> bool:
        """Whether there is any event."""
        return len(self.events) > 0


class Users:
    """Reads the user of a request.

    Args:
        bundle: knows items and actions.
        histories: stored histories by user id.
        limit: newest events that are used.
    """

    def __init__(self, bundle: Bundle, histories: HistoryReader, limit: int) -> None:
        self._bundle = bundle
        self._histories = histories
        self._limit = limit

    def read(
        self, user_id: str | None, inline: Sequence[InlineEvent] | None, at: int | None, now: int, ladder: Ladder
    ) -> User:
        """Return the user; an inline history is used instead of the stored one, which without a store is empty.

        Raises:
            RequestError: 422 for neither user nor history, or a moment out of range.
        """
        at = _moment(now if at is None else at, "at")
        if inline is not None:
            user_id, events = None, self._inline(inline)
        elif user_id is not None:
            reader, user = self._histories, user_id
            events = ladder.attempt("history", lambda: reader.read(user), None) or Events.empty()
        else:
            raise RequestError(422, "no_user", "neither user_id nor history given; expected one of them")
        events = events.before(at)
        events = events.slice(max(0, len(events) - self._limit), len(events))
        return User(events, rows_of(events.item, self._bundle.key_to_row), at, user_id)

    def _inline(self, history: Sequence[InlineEvent]) -> Events:
        moments = [_moment(event.timestamp, f"history[{i}].timestamp") for i, event in enumerate(history)]
        events = Events(
            np.array([self._bundle.key_of(event.item_id) for event in history], np.uint32),
            np.array([self._bundle.action_of(event.action) for event in history], np.uint8),
            np.array(moments, np.int64),
        )
        return Events.concatenate(events)


def _moment(value: int, field: str) -> int:
    if not -MAX_MOMENT <= value <= MAX_MOMENT:
        raise RequestError(422, "invalid_time", f"{field} is {value}; expected microseconds since 1970, UTC")
    return value
