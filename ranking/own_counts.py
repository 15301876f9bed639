"""How often, and how lately, a user chose each candidate before: exact, for any length of history and any catalogue."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ranking.batch import PAD, History
from recsys.history import DAY


class OwnEvents(NamedTuple):
    """A history ordered by item, so that each item's events lie side by side."""

    item: Tensor  # int32 [B, T], ascending; padding (0) first
    time: Tensor  # int64 [B, T], the events' times in that order
    action: Tensor  # uint8 [B, T], their actions' codes


def own_events(history: History, window: int | None = None) -> OwnEvents:
    """Return the newest `window` events (all without one) ordered by item; cost O(T log T)."""
    longest = int(history.lengths.max()) if len(history) else 0
    padded = history.padded(window or max(longest, 1))
    item, order = padded.item.sort(dim=1, stable=True)
    return OwnEvents(item, padded.time.gather(1, order), padded.action.to(torch.uint8).gather(1, order))


def add_event(own: OwnEvents, item: Tensor, time: Tensor, action: Tensor) -> OwnEvents:
    """Return the events with one more per request, as `own_events` would give them.

    Args:
        own: events ordered by item.
        item: int32 [B].
        time: int64 [B], not before any event of the item.
        action: integer [B], codes.
    """
    items, order = torch.cat([own.item, item[:, None]], 1).sort(dim=1, stable=True)
    times, actions = (
        torch.cat([before, new.to(before.dtype)[:, None]], 1).gather(1, order)
        for before, new in ((own.time, time), (own.action, action))
    )
    width = int((items != PAD).sum(1).max())
    return OwnEvents(items[:, -width:], times[:, -width:], actions[:, -width:])


def decayed_counts(own: OwnEvents, at: Tensor, item: Tensor, half_life_days: float) -> Tensor:
    """Return sum of 2^(-age / half_life) over each candidate's own events, float64 [B, C]; 0 if there are none.

    With the events of an item side by side the sum is a difference of two running sums, found by binary search: cost
    O((T + C) log T), never [B, C, T]. Running sums are float64, so that an old event does not drown beside many.

    Args:
        own: events ordered by item.
        at: int64 [B], moments of the requests; an event at or after it counts as fresh.
        item: int32 [B, C], candidates.
        half_life_days: age at which an event counts half.
    """
    running = F.pad(_fresh(own, at, half_life_days).cumsum(1), (1, 0))  # [B, T + 1]
    start, end = _places(own, item)
    return running.gather(1, end) - running.gather(1, start)


def decayed_total(own: OwnEvents, at: Tensor, half_life_days: float) -> Tensor:
    """Return the same sum over all events, float64 [B]."""
    return _fresh(own, at, half_life_days).sum(1)


class OwnSpan(NamedTuple):
    """Each candidate's own events: how many, and from when to when (0 if there are none), int64 [B, C] each."""

    number: Tensor
    oldest: Tensor
    newest: Tensor


def own_span(own: OwnEvents, item: Tensor) -> OwnSpan:
    """Return number, first and last moment of the events of each candidate (int32 [B, C])."""
    start, end = _places(own, item)
    count = end - start
    newest = (end - 1).clamp_min(0)
    oldest = torch.minimum(start, newest)  # in bounds where there are none
    return OwnSpan(count, *(own.time.gather(1, place).masked_fill(count == 0, 0) for place in (oldest, newest)))


def last_action(own: OwnEvents, item: Tensor) -> Tensor:
    """Return 1 + the code of the newest action on each candidate (int32 [B, C]), 0 if there is none; int64 [B, C]."""
    start, end = _places(own, item)
    return (own.action.gather(1, (end - 1).clamp_min(0)).long() + 1).masked_fill(start == end, 0)


def _places(own: OwnEvents, item: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the events of each candidate start and end, int64 [B, C]."""
    item = item.contiguous()
    return torch.searchsorted(own.item, item), torch.searchsorted(own.item, item, right=True)


def _fresh(own: OwnEvents, at: Tensor, half_life_days: float) -> Tensor:
    """Return 2^(-age / half_life) of every event, float64 [B, T], 0 at padding."""
    age = (at[:, None] - own.time).clamp_min(0).double() / (half_life_days * DAY)  # [B, T]
    return torch.exp2(-age).masked_fill(own.item == PAD, 0.0)
