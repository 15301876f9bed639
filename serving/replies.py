"""What the look-up and operating routes answer; clients build on these without the models' libraries."""

from pydantic import Field

from recsys.messages import Message


class ModelInfo(Message):
    """A model of the bundle being served."""

    role: str
    name: str


class ModelsResponse(Message):
    """The bundle being served."""

    version: str = Field(description="first 12 hexadecimal digits of the digest of the bundle's manifest")
    models: list[ModelInfo]
    items: int
    created: str = Field(description="ISO 8601, UTC")
    commit: str
    data_digest: str
    metrics: dict[str, float]
    lineup: dict[str, str] = Field(description="version of the bundle in each role: champion, challenger, shadow")
    challenger_share: float = Field(description="share of the users whom the challenger answers")


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
    score: float = Field(description="inner product of the retriever's item vectors")


class SimilarResponse(Message):
    """The nearest items, nearest first."""

    item_id: str
    name: str
    items: list[SimilarItem]
