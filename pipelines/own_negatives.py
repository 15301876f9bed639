"""Negatives from the user's own past: what they chose before and did not choose this time.

Where people repeat themselves, the items that compete for the top of a list are the user's own, and a sampler over the
catalogue hardly ever draws one of them: a model then learns to tell own items from others, not which of them is due.

    B requests    V item rows    H distinct items of a history
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.samplers import Ragged, Rows
from ranking.batch import FIRST_ITEM, PAD


@dataclass(frozen=True)
class OwnItems:
    """The known items of each request's history, each once: request * V + row, ascending; `start` int64 [B + 1]."""

    pair: NDArray[np.int64]
    start: NDArray[np.int64]
    rows: int

    @staticmethod
    def of(history: Ragged, rows: int) -> "OwnItems":
        """List them; `history` holds item rows of a table of `rows` rows."""
        request = np.repeat(np.arange(len(history)), history.lengths)
        known = history.values >= FIRST_ITEM
        pair = np.unique(request[known] * rows + history.values[known])
        return OwnItems(pair, np.searchsorted(pair, np.arange(len(history) + 1) * rows), rows)

    def draw(self, rng: np.random.Generator, basket: Ragged, count: int) -> Rows:
        """Draw `count` per request, alike and with replacement, none of its basket; int32 [B, count], `PAD` if none."""
        bought = np.repeat(np.arange(len(basket)), basket.lengths) * self.rows + basket.values
        allowed = self.pair[~np.isin(self.pair, bought)]
        start = np.searchsorted(allowed, np.arange(len(basket) + 1) * self.rows)
        size = np.diff(start)[:, None]
        place = start[:-1, None] + (rng.random((len(basket), count)) * size).astype(np.int64)
        drawn = allowed[np.minimum(place, len(allowed) - 1)] % self.rows if len(allowed) else np.zeros_like(place)
        return np.where(size > 0, drawn, PAD).astype(np.int32)

    def density(self, items: Rows) -> NDArray[np.float64]:
        """Return how likely one draw is each of items int32 [B, C], float64 [B, C]; a basket is not taken out of it."""
        wanted = np.arange(len(items))[:, None] * self.rows + items
        size = np.maximum(np.diff(self.start), 1)[:, None]
        if not len(self.pair):
            return np.zeros(items.shape)
        place = np.minimum(np.searchsorted(self.pair, wanted), len(self.pair) - 1)
        density: NDArray[np.float64] = (self.pair[place] == wanted) / size
        return density
