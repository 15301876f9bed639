"""How many of the items to be found their user touched moments before: a view and a cart that give a purchase away.

Without sessions every moment is a request of its own. A purchase then follows the view and the cart of the same visit,
and a model has only to repeat the history's last item. A session is one request, and its history ends where it begins.
"""

import numpy as np

from pipelines.prepared import PreparedSet, Split
from pipelines.scoring import draw_requests
from ranking.batch import rows_of
from recsys.history import POSITIONS

WINDOW = 30 * 60 * 1_000_000
"""Microseconds: how long before a request counts as moments before it, as long as a visit's usual gap."""
LARGE = 0.2
"""Share of the positives from which on figures tell of the visit, not of the user."""


def share_just_before(prepared: PreparedSet, split: Split, most: int, seed: int) -> float | None:
    """Return the share of positives whose item the user touched within `WINDOW` before the request.

    None where there is no positive, or no time but only an order. At most `most` requests are looked at, chosen by
    seed. Cost: one small search and sort per request.
    """
    sample = draw_requests(prepared, split, most, seed)
    some, events = sample.requests, prepared.histories.events
    if not len(some.positive) or int(some.at.min()) < POSITIONS:
        return None
    found = 0
    for start, end, at, low, high in zip(
        sample.start, some.end, some.at, some.offsets[:-1], some.offsets[1:], strict=True
    ):
        first = start + np.searchsorted(events.time[start:end], at - WINDOW)
        touched = rows_of(np.asarray(events.item[first:end]), prepared.key_to_row)
        found += int(np.isin(some.positive[low:high], touched).sum())
    return found / len(some.positive)


def caution(split: str, share: float | None) -> str | None:
    """Return what to say of such a share and what to do about it; None where it is not large."""
    if share is None or share < LARGE:
        return None
    return (
        f"{100 * share:.0f} % of the {split} positives were touched by the same user within 30 minutes before their "
        "request, as a purchase follows its own view and cart: repeating the last items finds them, and every figure "
        'flatters. Set [sessions] gap = "30m" in the mapping (and no [columns] session_id), ingest and prepare again: '
        "a visit is then one request"
    )
