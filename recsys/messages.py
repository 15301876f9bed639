"""Requests and responses of the service, the same objects for HTTP, the batch job and offline evaluation."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_CANDIDATES = 10_000
"""Most items one `rank` request may ask for; more is answered with 413."""


Id = Annotated[str, Field(max_length=512)]
"""An outside id. The bound also makes half of a surrogate pair, which no UTF-8 can carry, an error of its field."""


class Message(BaseModel):
    """Base of all messages: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class InlineEvent(Message):
    """One event of a history sent along with a request."""

    item_id: Id
    timestamp: int = Field(description="microseconds since 1970, UTC")
    action: str = Field(default="", max_length=64)


class RecommendRequest(Message):
    """Ask for the k best items for a user, or for an inline history."""

    user_id: Id | None = None
    history: list[InlineEvent] | None = Field(default=None, description="used instead of the stored history")
    k: int = Field(default=10, ge=1, le=1000)
    at: int | None = Field(default=None, description="moment of the request in microseconds UTC; now if absent")
    exclude_seen: bool = False


class RecommendedItem(Message):
    """One item of an answer."""

    item_id: str
    name: str
    score: float
    sources: list[str] = Field(description="candidate sources that proposed it")


class RecommendResponse(Message):
    """The k best items, best first."""

    items: list[RecommendedItem]
    shortfall: int = Field(description="how many of the k could not be filled")
    user_known: bool = Field(description="false: nothing is known of the user and the answer is by popularity")
    history_events: int
    model_version: str
    degraded: list[str] = Field(description="stages that were skipped")
    timings: dict[str, float] = Field(description="seconds by stage")


class RankRequest(Message):
    """Ask for the scores of given items for a user, or for an inline history."""

    user_id: Id | None = None
    history: list[InlineEvent] | None = None
    item_ids: list[Id] = Field(min_length=1)
    at: int | None = None


class RankResponse(Message):
    """Scores in the order of the request, and the ranked list; unknown items have no score and are listed apart."""

    scores: list[float | None]
    ranked: list[str]
    unknown_item_ids: list[str]
    user_known: bool
    history_events: int
    model_version: str
    degraded: list[str]
    timings: dict[str, float]


class EventIn(Message):
    """One event posted to the service."""

    user_id: str = Field(min_length=1, max_length=512)
    item_id: str = Field(min_length=1, max_length=512)
    timestamp: int | None = Field(default=None, description="microseconds since 1970, UTC; now if absent")
    action: str = Field(default="", max_length=64)
    value: float = 0.0
    event_id: str | None = Field(default=None, max_length=128, description="makes a repeated post harmless")


class EventsRequest(Message):
    """A list of events to record."""

    events: list[EventIn] = Field(min_length=1)


class EventVerdict(Message):
    """What became of one event.

    accepted                kept
    accepted_unknown_item   kept, scored as unknown until a bundle knows the item
    duplicate               the very same event is there already
    conflict                a different event has this `event_id`; that one stands, this one is not kept
    refused_future          dated more than a day ahead of the service's clock; not kept
    """

    event_id: str
    verdict: str


class EventsResponse(Message):
    """One verdict per event, in the order of the request; accepted events are durable and used by the next request."""

    verdicts: list[EventVerdict]
    accepted: int
