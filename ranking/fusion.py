"""Rankings of passages and their fusion: reciprocal ranks, and a weighted mean of min-max scores.

Q queries    K places    M rankings
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NONE = -1
"""passage of an empty place"""
RRF_K = 60.0
"""of Cormack, Clarke and Buettcher 2009"""


@dataclass(frozen=True)
class Ranking:
    """Passages found for each query, best first.

    Attributes:
        rows: int32 [Q, K] passage rows, `NONE` where a query found fewer.
        scores: float32 [Q, K], -inf there.
    """

    rows: NDArray[np.int32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def top(self, places: int) -> "Ranking":
        """Give the first places alone."""
        return Ranking(self.rows[:, :places], self.scores[:, :places])


def best(scores: NDArray[np.floating[Any]], places: int) -> Ranking:
    """Rank all passages by scores [Q, N]; equal scores by ascending row. Passages of score -inf are not found."""
    places = min(places, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :places]
    found = np.take_along_axis(scores, order, axis=1).astype(np.float32)
    return Ranking(np.where(np.isneginf(found), NONE, order).astype(np.int32), found)


def reciprocal_rank_fusion(rankings: Sequence[Ranking], places: int = 100, k: float = RRF_K) -> Ranking:
    """Score a passage by the sum of 1 / (k + rank) over the rankings that found it, ranks from 1."""
    return _fused(
        [
            (one.rows, np.broadcast_to((1.0 / (k + 1 + np.arange(one.rows.shape[1]))), one.rows.shape))
            for one in rankings
        ],
        places,
    )


def convex_fusion(lexical: Ranking, dense: Ranking, weight: float, places: int = 100) -> Ranking:
    """Score a passage by weight * lexical + (1 - weight) * dense, each scaled to [0, 1] over what its query found.

    A passage that one side did not find counts 0 there (Bruch, Gai and Ingber 2023, "theoretical" minimum left out).
    """
    scaled = ((lexical, weight), (dense, 1.0 - weight))
    return _fused([(one.rows, share * _min_max(one)) for one, share in scaled], places)


def _min_max(ranking: Ranking) -> NDArray[np.float64]:
    scores = np.where(ranking.rows == NONE, np.nan, ranking.scores).astype(np.float64)
    if not scores.size:
        return scores
    empty = np.isnan(scores).all(axis=1)
    scores[empty] = 0.0
    low, high = np.nanmin(scores, axis=1, keepdims=True), np.nanmax(scores, axis=1, keepdims=True)
    spread = np.where(high > low, high - low, 1.0)
    scaled: NDArray[np.float64] = np.where(high > low, (scores - low) / spread, 1.0)
    return scaled


def _fused(parts: Sequence[tuple[NDArray[np.int32], NDArray[np.float64]]], places: int) -> Ranking:
    queries = len(parts[0][0])
    rows = np.full((queries, places), NONE, np.int32)
    scores = np.full((queries, places), -np.inf, np.float32)
    for query in range(queries):
        found = np.concatenate([part[0][query] for part in parts])
        values = np.concatenate([part[1][query] for part in parts])[found != NONE]
        passages, place = np.unique(found[found != NONE], return_inverse=True)
        total = np.bincount(place, values, len(passages))
        order = np.argsort(-total, kind="stable")[:places]  # equal totals by ascending row
        rows[query, : len(order)] = passages[order]
        scores[query, : len(order)] = total[order]
    return Ranking(rows, scores)
