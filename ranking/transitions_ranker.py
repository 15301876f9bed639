"""First-order transitions: what followed the user's newest basket, in everybody's training histories.

    P(j | u) ~ mean over items i of the newest basket of C_ij / sum_j C_ij + prior * (count_j + 1) / (all counts + V)

C counts directed transitions between consecutive baskets of one user (`ranking.items.Transitions`). The second term is
the share of item j in everybody's choices; it orders what never followed and breaks ties. The score is the logarithm.
Where every basket is one item and `prior` is small, this is the TRANS baseline of the MQSA-TED experiments,
C[newest item, j] + 1e-6 * count_j, in the same order: rows are divided by their sum, which is one number per user.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ranking.batch import Batch, Candidates, History, Request
from ranking.embeddings import take
from ranking.followers import followed, newest_basket, out_weights
from ranking.items import ItemTable
from ranking.ranker import NEGATIVE, Loss, TrainsOn
from recsys.errors import ConfigError, RecsysError


@dataclass(frozen=True)
class TransitionsConfig:
    """How much of the newest basket is read, and what popularity counts beside it.

    Attributes:
        prior: weight of popularity; 1 makes it count as much as the transitions.
        window: newest events read; a basket with more is cut to the newest of them.
    """

    prior: float = 1e-3
    window: int = 200

    def __post_init__(self) -> None:
        if self.prior <= 0 or self.window < 1:
            raise ConfigError(f"prior={self.prior}, window={self.window}: expected prior above 0, window at least 1")


class TransitionsRanker(nn.Module):
    """Scores an item by how often it came after the items of the newest basket."""

    trains_on: ClassVar[TrainsOn] = "nothing"
    total: Tensor

    def __init__(self, config: TransitionsConfig, items: ItemTable) -> None:
        super().__init__()
        self.config = config
        self.items = items
        self.register_buffer("total", out_weights(items.transitions), persistent=False)

    @property
    def window(self) -> int | None:
        """Newest events read."""
        return self.config.window

    def encode(self, history: History) -> Tensor:
        """Return the distinct items of the newest basket, int32 [B, M], 0 = padding."""
        return newest_basket(history, self.config.window)

    def score(self, state: Tensor, request: Request, candidates: Candidates) -> Tensor:
        """Return log(P + prior * share), float32 [B, C]; cost O(M C log degree)."""
        p = followed(self.items.transitions, self.total, state, candidates.item)
        count = self.items.count
        share = (take(count, candidates.item) + 1).double() / float(count.sum() + len(self.items))
        logits = (p + self.config.prior * share).log().float()
        return logits.masked_fill(~candidates.mask, NEGATIVE)

    def loss(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Raise: there is nothing to train."""
        raise RecsysError("transitions has no parameters; it is ready as built, leave out training")
