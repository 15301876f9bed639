"""Histories as runs of baskets: what one user did at one moment has no order inside.

Where every moment has one event, baskets are events and all of this is the ordinary reading of a sequence.

    B users    T slots (events)    G baskets    V item rows    C candidates    D width    P pairs
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ranking.batch import FIRST_ITEM, PAD, Padded
from ranking.embeddings import take


@dataclass(frozen=True)
class Slots:
    """Histories in baskets: slots are events, left-padded; the newest basket of every user is basket G - 1."""

    item: Tensor  # int64 [B, T], 0 = padding
    basket: Tensor  # int64 [B, T], which of the G; anything at padding
    count: Tensor  # [B, G] events of each basket, 0 = no such basket
    single: bool  # every basket is one event, so that slots and baskets coincide

    @property
    def real(self) -> Tensor:
        """True at events, bool [B, T]."""
        return self.item != PAD

    def sums(self, x: Tensor) -> Tensor:
        """Add up what the slots of each basket hold; [B, T, D] (0 at padding) -> [B, G, D]."""
        if self.single:
            return x
        (B, G), D = self.count.shape, x.shape[2]
        rows = self.basket + G * torch.arange(B, device=x.device)[:, None]  # [B, T]
        return x.new_zeros(B * G, D).index_add(0, rows.flatten(), x.flatten(0, 1)).view(B, G, D)


def arrange(padded: Padded, embedding_row: Tensor, baskets: bool) -> Slots:
    """Cut padded histories into baskets of equal time (or single events).

    Args:
        padded: newest event last, times ascending.
        embedding_row: int32 [V], the row an item is read at (untrained items: row 1).
        baskets: False makes every event its own basket.

    Items are put in order of id inside a basket, so that not even a rounding depends on how the log ordered them.
    """
    item = take(embedding_row, padded.item).long()  # [B, T]
    starts = padded.mask.clone()  # [B, T] True at the first event of each basket
    if baskets:
        starts[:, 1:] &= ~padded.mask[:, :-1] | (padded.time[:, 1:] != padded.time[:, :-1])
    number = starts.sum(1)  # [B] baskets
    G = max(int(number.max()), 1)
    basket = (G - number[:, None] - 1 + starts.cumsum(1)).clamp_(min=0)  # [B, T]
    single = item.shape[1] == G and bool((number == padded.mask.sum(1)).all())
    if not single:
        rows = len(embedding_row)
        key = (basket * rows + item).masked_fill(item == PAD, -1).sort(dim=1).values  # padding stays left
        basket, item = (key // rows).clamp_(min=0), (key % rows).masked_fill(key < 0, PAD)
    count = torch.zeros(len(item), G, device=item.device).scatter_add_(1, basket, (item != PAD).float())
    return Slots(item, basket, count, single)


def targets(slots: Slots, following: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distinct (query, target) pairs of a group: flat query index b G + g and item row, int64 [P] each.

    The items of each basket are the targets of the basket before it, `following` int64 [B, C] (0 or 1 = none) those of
    the newest. A query is a basket with at least one event, a target a known item.
    """
    B, G = slots.count.shape
    user = torch.arange(B, device=following.device)[:, None]
    query = torch.cat([slots.basket - 1, torch.full_like(following, G - 1)], dim=1)  # [B, T + C]
    item = torch.cat([slots.item, following], dim=1)
    exists = (query >= 0) & (slots.count.gather(1, query.clamp(min=0)) > 0)
    valid = exists & (item >= FIRST_ITEM)
    largest = int(item.max()) + 1
    pairs = torch.unique(((user * G + query) * largest + item)[valid])
    return pairs // largest, pairs % largest


def by_length(lengths: Tensor) -> list[Tensor]:
    """Group users with at least one event by length: up to 8, 16, 32, ... events; each group is int64 indices.

    On a GPU all of them are one group: launching every layer once for each length costs more than padding.
    """
    if lengths.device.type != "cpu":
        return [lengths.nonzero().squeeze(1)]
    group = torch.log2(lengths.clamp(min=8).double()).ceil().masked_fill(lengths == 0, 0)
    return [(group == value).nonzero().squeeze(1) for value in torch.unique(group).tolist() if value]
