"""What was found of attention (`pipelines.attention`), as plain records."""

from dataclasses import dataclass

from recsys.bootstrap import Value


@dataclass(frozen=True)
class Distance:
    """A model's mean distance from exact attention over the requests of one history length."""

    model: str
    segment: str
    requests: int
    elsewhere: Value
    turned: Value


@dataclass(frozen=True)
class Looked:
    """An item of the history: its share of a candidate's attention, its events, and how long before the newest was.

    `days` is None for a log that knows only an order.
    """

    item: str
    share: float
    events: int
    back: int
    days: float | None


@dataclass(frozen=True)
class View:
    """What one model made of an example: the rank of what was taken among the candidates, and what it looked at."""

    model: str
    rank: int
    looked: list[Looked]


@dataclass(frozen=True)
class Example:
    """A request: an item that was taken, after `events` events, and each model's view of it."""

    item: str
    events: int
    candidates: int
    views: list[View]


@dataclass(frozen=True)
class AttentionFound:
    """Distances by model and history length over `requests` requests, and examples by item name."""

    requests: int
    distances: list[Distance]
    examples: list[Example]
