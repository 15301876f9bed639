"""What the look-up and operating routes answer; clients build on these without the models' libraries."""

from typing import Literal

from pydantic import Field

from recsys.messages import Message, Told

PROBLEM = "application/problem+json"
"""The media type of every refusal (`serving.problems`)."""


class ModelInfo(Message):
    """A model of the bundle being served."""

    role: str
    name: str


class EventLogInfo(Message):
    """How posted events are kept."""

    id: str
    durability: str = Field(description="`fsync`: on the disk before the answer; `os`: with the operating system")
    window: int = Field(description="newest events among which a repeated event_id is recognised")
    end: int = Field(description="position after the newest entry this process knows, bytes")
    recovered_tails: int = Field(description="writers that died while they wrote, since the log began")
    recovered_bytes: int = Field(description="what they left, told to nobody as durable, and was cut off")


class HistoryStoreInfo(Message):
    """The view of the log that histories are read from."""

    kind: str
    available: bool
    position: int | None = Field(description="of the log, up to which events are in the view; null if unavailable")
    unknown_events: int | None = Field(description="events whose item no bundle has known yet; null if unavailable")


class ModelsResponse(Message):
    """The bundle being served, and the state under it."""

    version: str = Field(description="first 12 hexadecimal digits of the digest of the bundle's manifest")
    models: list[ModelInfo]
    items: int
    passages: int | None = Field(default=None, description="distinct texts a search goes over; null without text")
    rerank_depth: int | None = Field(
        default=None,
        description="passages at the head of a search that are reranked within the default budget, by this machine's "
        "measured speed; a request's own budget_ms scales it",
    )
    created: str = Field(description="ISO 8601, UTC")
    commit: str
    data_digest: str
    metrics: dict[str, float]
    lineup: dict[str, str] = Field(description="version of the bundle in each role: champion, challenger, shadow")
    challenger_share: float = Field(description="share of the users whom the challenger answers")
    event_log: EventLogInfo
    history_store: HistoryStoreInfo


class UsersResponse(Message):
    """Some user ids, those with posted events first."""

    users: list[str]


class HistoryEvent(Message):
    """One event of a history; an item the bundle does not know has neither id nor name."""

    item_id: str | None
    name: str | None
    timestamp: int = Field(description="microseconds since 1970, UTC")
    action: str


class HistoryResponse(Message):
    """What is known of a user, newest event first."""

    user_id: str
    total: int
    events: list[HistoryEvent]


class ForgottenResponse(Message):
    """What was known of a user and counts no longer."""

    user_id: str
    snapshot_events: int = Field(description="events of the published snapshot")
    posted_events: int = Field(description="events that were posted")
    position: int = Field(description="of the tombstone in the event log: what lies before it counts no longer")
    erased: list[str] = Field(description="where the events are gone")
    hidden: list[str] = Field(description="where they lie until written anew, and nothing uses them")


class FoundItem(Message):
    """An item of the bundle."""

    item_id: str
    name: str
    events: int = Field(description="events of the item in the training period")


class ItemsResponse(Message):
    """Items whose name holds the text asked for."""

    items: list[FoundItem]


class SimilarItem(Message):
    """A neighbour of an item."""

    item_id: str
    name: str
    score: float = Field(description="inner product of the retriever's item vectors, or cosine of the contents")


class SimilarResponse(Message):
    """The nearest items, nearest first."""

    item_id: str
    name: str
    by: Literal["vectors", "content"] = Field(
        description="what is compared; content (text and categories) for an item without training events and vector"
    )
    items: list[SimilarItem]
    warnings: Told = Field(default=[], description="values of the request's filters that no item has; absent if none")
