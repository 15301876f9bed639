"""Labels for what was shown: the rows of an impression log, from answers and the events after them."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import polars as pl

from pipelines.mapping import PositiveRule
from recsys.columns import ITEM_ID, LABEL, REQUEST_ID, TIMESTAMP, USER_ID
from recsys.stores import Event

SCHEMA = pl.Schema(
    [
        (REQUEST_ID, pl.String()),
        (USER_ID, pl.String()),
        (ITEM_ID, pl.String()),
        (TIMESTAMP, pl.Int64()),
        (LABEL, pl.UInt8()),
        ("position", pl.Int32()),  # from 1
        ("propensity", pl.Float64()),
    ]
)


@dataclass(frozen=True)
class Shown:
    """An answer: items with the propensity of each, best first, at a moment in microseconds UTC."""

    request_id: str
    user_id: str
    at: int
    items: tuple[tuple[str, float], ...]


def labelled(shown: Sequence[Shown], events: Iterable[Event], rule: PositiveRule, window: int) -> pl.DataFrame:
    """Return a row for every item shown, in the order of `SCHEMA`.

    Args:
        shown: answers whose window has passed.
        events: of their users, in any order.
        rule: which events are positives.
        window: microseconds after an answer in which an event counts for it: at < time <= at + window.

    An event counts for the last answer before it that showed the item, if that is within the window.
    """
    moments: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for number, one in enumerate(shown):
        for item, _ in one.items:
            moments[one.user_id, item].append((one.at, number))
    for answers in moments.values():
        answers.sort()
    positive: set[tuple[int, str]] = set()
    for event in events:
        answers = moments.get((event.user_id, event.item_id), [])
        place = bisect_left(answers, (event.time, -1)) - 1
        if place >= 0 and event.time <= answers[place][0] + window and is_positive(event, rule):
            positive.add((answers[place][1], event.item_id))
    rows = [
        (one.request_id, one.user_id, item, one.at, int((number, item) in positive), place, propensity)
        for number, one in enumerate(shown)
        for place, (item, propensity) in enumerate(one.items, start=1)
    ]
    return pl.DataFrame(rows, SCHEMA, orient="row")


def is_positive(event: Event, rule: PositiveRule) -> bool:
    """Whether an event is a positive: of one of the rule's actions, and of its value at least."""
    wanted = not rule.actions or event.action in rule.actions
    enough = rule.min_value is None or (event.value is not None and event.value >= rule.min_value)
    return wanted and enough
