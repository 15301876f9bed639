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
WEIGHT, COVERED_WEIGHT = 0.4, 0.9
"""of the words in a hybrid search: the best of four for SciFact's training queries, and what did well on spans cut from
Cranfield's and MED's documents"""
POOL = 1000
"""Passages that each side of a hybrid search hands in. One that a side did not find counts 0 there, which costs half
a point of nDCG@10 on Cranfield if each hands in 100."""
COVERED = 0.9
"""Share of a query's words, by idf, that a passage holds if it covers the query."""


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
        """Return the first places alone."""
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


def convex_fusion(lexical: Ranking, dense: Ranking, weight: float | NDArray[np.float64], places: int = 100) -> Ranking:
    """Score a passage by weight * lexical + (1 - weight) * dense, each scaled to [0, 1] over what its query found.

    A passage that one side did not find counts 0 there (Bruch, Gai and Ingber 2023, "theoretical" minimum left out).
    The weight is one for all queries, or [Q].
    """
    share = np.broadcast_to(np.asarray(weight, np.float64), len(lexical))[:, None]
    scaled = ((lexical, share), (dense, 1.0 - share))
    return _fused([(one.rows, part * _min_max(one)) for one, part in scaled], places)


@dataclass(frozen=True)
class Mix:
    """How words and vectors become one order.

    A query that one passage answers word for word (a span of it, a few of its terms) is what vectors find worst, and a
    question in the reader's own words is what words find worst. So the weight depends on the query: `covered` counts
    where the best passage by words holds nearly all of them.

    Attributes:
        weight: of the words in the convex sum; None for reciprocal ranks.
        covered: of the words where a query is covered; None for `weight` there, too.
    """

    weight: float | None = WEIGHT
    covered: float | None = COVERED_WEIGHT

    def fuse(self, lexical: Ranking, dense: Ranking, coverage: NDArray[np.float64], places: int = 100) -> Ranking:
        """Return one order of what words and vectors found; `coverage` [Q] is that of `ranking.bm25`."""
        if self.weight is None:
            return reciprocal_rank_fusion([lexical, dense], places)
        high = self.weight if self.covered is None else max(self.covered, self.weight)
        return convex_fusion(lexical, dense, np.where(coverage >= COVERED, high, self.weight), places)


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
