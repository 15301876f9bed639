"""Personal frequency: what this user chose before, and how lately. The one to beat where people repeat themselves.

    f(u, i)  =  sum over events of i in u's history of 2^(-age / half_life)
    P(i | u) ~  f(u, i) + prior * (count_i + 1) / (sum of counts + V)

The second term is the share of item i in everybody's choices: `prior` says how many fresh events of one's own it is
worth (Dirichlet smoothing). It orders the items a user has never touched, and breaks ties. The score is the logarithm.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import take
from ranking.items import ItemTable
from ranking.own_counts import OwnEvents, decayed_counts, own_events
from ranking.ranker import NEGATIVE, Loss, TrainsOn
from recsys.errors import ConfigError, RecsysError


@dataclass(frozen=True)
class PersonalFrequencyConfig:
    """How fast a choice is forgotten, and what everybody's choices count beside one's own.

    Attributes:
        half_life_days: age at which an event counts half.
        prior: weight of popularity, in fresh events.
        window: newest events read; None reads all.
    """

    half_life_days: float = 60.0
    prior: float = 1.0
    window: int | None = None

    def __post_init__(self) -> None:
        if not (self.half_life_days > 0 and self.prior > 0):
            raise ConfigError(f"half_life_days={self.half_life_days}, prior={self.prior}: expected both above 0")


class PersonalFrequency(nn.Module):
    """Scores an item by the decayed count of the user's own events of it, smoothed by its popularity."""

    trains_on: ClassVar[TrainsOn] = "nothing"

    def __init__(self, config: PersonalFrequencyConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items

    @property
    def window(self) -> int | None:
        """Newest events read; None reads all."""
        return self.config.window

    def encode(self, history: History) -> OwnEvents:
        """Return the history ordered by item."""
        return own_events(history, self.config.window)

    def score(self, state: OwnEvents, request: Request, candidates: Candidates) -> Tensor:
        """Return log(f + prior * share), float32 [B, C]; cost O((T + C) log T)."""
        f = decayed_counts(state, request.at, candidates.item, self.config.half_life_days)
        count = self.items.count
        share = (take(count, candidates.item) + 1).double() / float(count.sum() + len(self.items))
        logits = (f + self.config.prior * share).log().float()
        return logits.masked_fill(~candidates.mask, NEGATIVE)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Raise: there is nothing to train."""
        raise RecsysError("personal_frequency has no parameters; it is ready as built, leave out training")
