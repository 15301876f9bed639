"""Popularity: how often an item occurred in the training period. The floor every model must clear."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import take
from ranking.items import ItemTable
from ranking.ranker import NEGATIVE, Loss, TrainsOn
from recsys.errors import RecsysError


@dataclass(frozen=True)
class PopularityConfig:
    """There is nothing to choose."""


class Popularity(nn.Module):
    """Scores an item by log(1 + its training events), the same for everybody."""

    trains_on: ClassVar[TrainsOn] = "nothing"

    def __init__(self, config: PopularityConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items

    @property
    def window(self) -> int | None:
        """No event is read, but one must be asked for."""
        return 1

    def encode(self, history: History) -> Tensor:
        """Return an empty state, float32 [B, 0]: the history is not read."""
        return torch.empty(len(history), 0, device=history.item.device)

    def score(self, state: Tensor, request: Request, candidates: Candidates) -> Tensor:
        """Return log(1 + count), float32 [B, C]."""
        logits = take(self.items.count, candidates.item).double().log1p().float()
        return logits.masked_fill(~candidates.mask, NEGATIVE)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Raise: there is nothing to train."""
        raise RecsysError("popularity has no parameters; it is ready as built, leave out training")
