"""Requests and responses of the service, the same objects for HTTP, the batch job and offline evaluation."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StringConstraints,
    WithJsonSchema,
)

from recsys.errors import RequestError
from recsys.history import EARLIEST, LATEST

MAX_CANDIDATES = 10_000
"""Most items one `rank` request may ask for; more is answered with 413."""

MAX_EVENTS = 1_000
"""Most events one post may carry; more is answered with 413."""

MAX_HISTORY = 10_000
"""Most events of a history sent along, which is what a ranker reads at most; more is answered with 413."""

MAX_DAYS = 36_500
"""For which items may be left out as seen."""

Id = Annotated[str, Field(max_length=512)]
"""An outside id. The bound also makes half of a surrogate pair, which no UTF-8 can carry, an error of its field."""

Action = Annotated[str, Field(max_length=64)]
"""What a user did with an item; "" says nothing."""

MAX_QUERY = 4096
"""Longest query in characters. Models read some 64 tokens of it, BM25 all of it."""

Query = Annotated[str, StringConstraints(min_length=1, max_length=MAX_QUERY, pattern=r"\S")]
"""A text to search for; not blank."""


def _microseconds(value: int) -> int:
    """Refuse a time in seconds or milliseconds, which would pass for one of 1970."""
    for unit, scale in (("seconds", 1_000_000), ("milliseconds", 1_000)):
        if EARLIEST <= value * scale < LATEST:
            raise ValueError(f"{value} is a time of this day and age in {unit}; expected microseconds since 1970")
    return value


EXPECTED = "expected a whole number of microseconds since 1970, or ISO 8601 with its zone, as 2026-03-01T09:30:00Z"


def _read(value: Any) -> Any:
    """Return the microseconds of a time in ISO 8601; numbers as they are."""
    if isinstance(value, bool):  # pydantic would take true for 1
        raise ValueError(EXPECTED)  # noqa: TRY004 - of TypeErrors pydantic makes no 422
    if not isinstance(value, str):
        return value
    try:
        stated = datetime.fromisoformat(value.upper())
    except ValueError:
        raise ValueError(EXPECTED) from None
    if stated.tzinfo is None:
        raise ValueError(f"{value} names no zone; expected one at its end, Z or such as +01:00")
    return (stated - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


Moment = Annotated[
    int,
    BeforeValidator(_read),
    AfterValidator(_microseconds),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "format": "date-time"}]}, mode="validation"),
]
"""Microseconds since 1970, UTC, or the same as ISO 8601; of a log that knows only an order positions, small numbers."""


WHEN = "microseconds since 1970, UTC, or ISO 8601 with its zone"


class Message(BaseModel):
    """Base of all messages: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def few(most: int, what: str) -> BeforeValidator:
    """Refuse a longer list before any of it is read; `what` it holds, in words."""

    def checked(value: Any) -> Any:
        if isinstance(value, list) and len(value) > most:
            raise RequestError(413, "too_many_events", f"{len(value)} events; {what} may carry up to {most}")
        return value

    return BeforeValidator(checked)


class InlineEvent(Message):
    """One event of a history sent along with a request."""

    item_id: Id
    timestamp: Moment = Field(description=WHEN)
    action: Action = ""


Inline = Annotated[list[InlineEvent], Field(fail_fast=True), few(MAX_HISTORY, "a history")]
"""A history sent along. As in every list a client sends, the first wrong entry is told and the others are not read:
errors take a hundred times the time of what is right."""

Values = Annotated[tuple[str, ...], Field(fail_fast=True)]
"""Values of a filter."""


def _nothing(told: list[str]) -> bool:
    return not told


Told = Annotated[list[str], Field(exclude_if=_nothing)]
"""What a request can hardly have meant; absent from the answer where there is nothing to say."""


@dataclass(frozen=True)
class ItemFilter:
    """Which items may be recommended, by one attribute; the same in a request and under `[[filters]]` of a config.

    Attributes:
        column: a categorical, multi-valued or numeric item column, or `item_id`.
        allow: the item has one of these values; an item without a value is left out.
        deny: the item has none of these values.
        at_least: the item's number is not below this; an item without a number is left out.
        at_most: the item's number is not above this; an item without a number is left out.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    column: Annotated[str, Field(max_length=512)]
    allow: Values | None = None
    deny: Values | None = None
    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None

    def __post_init__(self) -> None:
        try:
            "".join((self.column, *(self.allow or ()), *(self.deny or ()))).encode()
        except UnicodeEncodeError:
            raise ValueError(f"a filter of {self.column!r} has half of a surrogate pair, which no text may") from None
        values = self.allow is not None or self.deny is not None
        numbers = self.at_least is not None or self.at_most is not None
        if values == numbers:
            raise ValueError(
                f"a filter of {self.column!r} has {'both' if values else 'neither'} values and numbers; "
                "expected allow or deny (values), or at_least or at_most (numbers)"
            )


MAX_FILTERS = 16
"""Most filters of one request."""


class RecommendRequest(Message):
    """Ask for the k best items for a user, or for an inline history."""

    user_id: Id | None = None
    history: Inline | None = Field(default=None, description="used instead of the stored history")
    k: int = Field(default=10, ge=1, le=1000)
    at: Moment | None = Field(default=None, description=f"moment of the request, {WHEN}; now if absent")
    exclude_seen: bool = Field(default=False, description="leave out every item of the history")
    exclude_seen_days: float | None = Field(
        default=None, ge=0, le=MAX_DAYS, description="leave out items of this many last days; the config's if absent"
    )
    exclude_seen_actions: list[Action] | None = Field(
        default=None,
        max_length=MAX_FILTERS,
        description="for both: only events of these actions count as seen, of any if empty; the config's if absent",
    )
    filters: list[ItemFilter] = Field(
        default=[], max_length=MAX_FILTERS, description="an item must pass all of them, and those of the config"
    )
    query: Query | None = Field(
        default=None,
        description="recommend of what a search for this text finds, in an order that blends search and ranker",
    )
    explain: bool = Field(default=False, description="say how each item came in, and why others did not")


class SimilarRequest(Message):
    """Ask for the k items nearest to an item."""

    k: int = Field(default=10, ge=1, le=1000)
    filters: list[ItemFilter] = Field(
        default=[], max_length=MAX_FILTERS, description="a neighbour must pass all of them, and those of the config"
    )


class StagePlace(Message):
    """Where an item stood in one stage."""

    stage: str = Field(description="a candidate source, or `score`, `rules`")
    rank: int = Field(description="from 1")
    score: float | None = Field(description="what the stage ordered by, in its own units")


class DroppedItem(Message):
    """An item that was proposed and is not in the answer."""

    item_id: str
    stage: str = Field(description="`filter`, `score`, `rules` or `top_k`")
    reason: str


class Explanation(Message):
    """How the answer came about."""

    candidates: int = Field(description="items that were scored")
    rounds: int = Field(description="searches it took: above 1 where filters or rules left too few of the first")
    dropped: list[DroppedItem] = Field(description="the first of them: by filters, by rules, then by score")
    dropped_counts: dict[str, int] = Field(description="all of them by reason")


class RecommendedItem(Message):
    """One item of an answer."""

    item_id: str
    name: str
    score: float
    sources: list[str] = Field(description="candidate sources that proposed it")
    stages: list[StagePlace] | None = Field(default=None, description="where it stood; only if asked to explain")


class RecommendResponse(Message):
    """The k best items, best first."""

    items: list[RecommendedItem]
    shortfall: int = Field(description="how many of the k could not be filled")
    user_known: bool = Field(description="false: nothing is known of the user and the answer is by popularity")
    history_events: int
    candidates: int = Field(default=0, description="items that were scored")
    calibrated: bool = Field(default=False, description="scores are probabilities of being taken when shown")
    model_version: str
    degraded: list[str] = Field(description="stages that were skipped")
    timings: dict[str, float] = Field(description="seconds by stage")
    explanation: Explanation | None = Field(default=None, description="only if asked to explain")
    warnings: Told = Field(default=[], description="values of the request's filters that no item has; absent if none")


class RankRequest(Message):
    """Ask for the scores of given items for a user, or for an inline history."""

    user_id: Id | None = None
    history: Inline | None = None
    item_ids: Annotated[list[Id], Field(fail_fast=True)] = Field(min_length=1)
    at: Moment | None = Field(default=None, description=f"moment of the request, {WHEN}; now if absent")


class RankResponse(Message):
    """Scores in the order of the request, and the ranked list; unknown items have no score and are listed apart."""

    scores: list[float | None]
    ranked: list[str]
    unknown_item_ids: list[str]
    user_known: bool
    history_events: int
    calibrated: bool = Field(default=False, description="scores are probabilities of being taken when shown")
    model_version: str
    degraded: list[str]
    timings: dict[str, float]


class EventIn(Message):
    """One event posted to the service."""

    user_id: str = Field(min_length=1, max_length=512)
    item_id: str = Field(min_length=1, max_length=512)
    timestamp: Moment | None = Field(default=None, description=f"{WHEN}; now if absent")
    action: Action = ""
    value: FiniteFloat | None = Field(default=None, description="a quantity or a rating, if the event has one")
    event_id: str | None = Field(default=None, max_length=128, description="makes a repeated post harmless")


class EventsRequest(Message):
    """A list of events to record."""

    events: Annotated[list[EventIn], Field(fail_fast=True), few(MAX_EVENTS, "one post")] = Field(min_length=1)


class EventVerdict(Message):
    """What became of one event.

    accepted                kept
    accepted_unknown_item   kept, scored as unknown until a bundle knows the item
    accepted_unknown_action kept, an event without an action until histories are built anew for a bundle that knows it
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
    warnings: Told = Field(default=[], description="actions that the bundle does not know; absent if none")
