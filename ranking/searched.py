"""What a search found, its items, and its blend with a user's ranker.

A blend reads ranks alone, since scores of a reranker and of a ranker have nothing in common. It is of what fits the
query equally well: the passages that hold nearly all of its words, or, where none does, the head of the search. All
others stand below, in the order of the search: whoever asks for an item by its name finds it, whatever else they like.

    n passages found    C candidate items
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ranking.fusion import COVERED, RRF_K
from ranking.search_part import SearchPart
from ranking.sources import Proposal, SourceQuery
from recsys.errors import ConfigError
from recsys.messages import MAX_CANDIDATES
from recsys.search_messages import Mode


@dataclass(frozen=True)
class SearchConfig:
    """How a search is done."""

    depth: int = 100
    """passages of each first stage"""
    rerank: int = 20
    """passages at the head of the first stage that are reranked, if the budget is enough for so many"""
    rerank_covered: bool = False
    """rerank also where one passage holds nearly all words of the query, unless the request says itself"""
    items_per_passage: int = 20
    """items of one text that a ranker scores, those most frequent in training"""
    personal_weight: float = 1.0
    """of the ranker in a blend; the search has 1"""
    personal: int = 20
    """passages at the head of the search that are blended, where none holds nearly all words of the query"""
    budget_ms: int = 1_000
    """time of a search that names none"""
    rerank_budget_ms: int = 30_000
    """time of a rerank request that names none"""

    def __post_init__(self) -> None:
        for name in ("depth", "items_per_passage"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[search] {name} is {getattr(self, name)}; expected at least 1")
        for name in ("rerank", "personal_weight", "personal", "budget_ms", "rerank_budget_ms"):
            if getattr(self, name) < 0:
                raise ConfigError(f"[search] {name} is {getattr(self, name)}; expected 0 or more")
        if self.depth * self.items_per_passage > MAX_CANDIDATES:
            raise ConfigError(
                f"[search] depth is {self.depth} and items_per_passage {self.items_per_passage}: a ranker would score "
                f"{self.depth * self.items_per_passage} items of one search; expected at most {MAX_CANDIDATES}"
            )


@dataclass(frozen=True)
class Searched:
    """What a search found; also the candidate source of `Recommender` for a request with a query.

    Attributes:
        rows: int32 [n] passages, best first.
        scores: float32 [n]; of the reranker for the first `reranked`, of the first stage below: two scales, which fall
            within each part but not from one to the other.
        first: int64 [n] rank in the first stage, from 1.
        reranked: how many at the head the reranker ordered.
        truncated: bool [n], of which the reranker read only the beginning.
        mode: first stage that was used.
        degraded: stages skipped for want of time.
        timings: seconds by stage.
        covered: whether the reranker was left out because one passage holds nearly all words of the query.
        query: what was searched for.
        part: where the passages are from.
        allowed: bool [V] the items that were searched for; None for all.
        config: how items are drawn from passages, and blended.
    """

    name: ClassVar[str] = "search"

    rows: NDArray[np.int32]
    scores: NDArray[np.float32]
    first: NDArray[np.int64]
    reranked: int
    truncated: NDArray[np.bool_]
    mode: Mode
    degraded: tuple[str, ...]
    timings: dict[str, float]
    covered: bool
    query: str
    part: SearchPart
    allowed: NDArray[np.bool_] | None = None
    config: SearchConfig = field(default_factory=SearchConfig)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def stages(self) -> dict[str, float]:
        """Seconds by stage, without their total."""
        return {stage: seconds for stage, seconds in self.timings.items() if stage != "total"}

    def after(self, stage: str, seconds: float) -> "Searched":
        """Add a stage outside the search to the timings."""
        timings = {**self.stages, stage: seconds}
        return replace(self, timings={**timings, "total": self.timings["total"] + seconds})

    def without(self, stage: str) -> "Searched":
        """Name a stage that was skipped."""
        return replace(self, degraded=(*self.degraded, stage))

    def items(self, allowed: NDArray[np.bool_] | None = None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return candidate items int32 [C], best passage first, and int64 [C] the place of each one's passage."""
        allowed = self.allowed if allowed is None else allowed
        return self.part.passages.items_of(self.rows, self.config.items_per_passage, allowed)

    def propose(self, query: SourceQuery, limit: int) -> Proposal:
        """Return the items of the found passages, whatever the limit: all of them are ranked together."""
        rows, places = self.items(query.allowed)
        return Proposal(rows, (1.0 / (RRF_K + 1 + places)).astype(np.float32))

    def blended(self, rows: NDArray[np.int32], scores: NDArray[np.float32], known: bool) -> NDArray[np.float32]:
        """Return float32 [C] the blend of search and ranker for items of `items`.

        Args:
            rows: int32 [C].
            scores: float32 [C] by the ranker; popularity where nothing is known of the user.
            known: whether something is; else the scores only order the items of one passage.
        """
        own, places = self.part.passages.items_of(self.rows)
        place = np.zeros(int(max(own.max(initial=0), rows.max(initial=0))) + 1, np.int64)
        place[own] = places
        order, blends = self._parted(known)
        blended = blends[place[rows]]
        rank = np.empty(len(rows), np.int64)
        rank[np.lexsort((rows, -scores, ~blended))] = np.arange(len(rows))
        found = 1.0 / (RRF_K + 1 + order[place[rows]])
        gap = 1.0 / ((RRF_K + len(self)) * (RRF_K + 1 + len(self)))  # the least between two passages
        own_term = np.where(
            blended, self.config.personal_weight / (RRF_K + 1 + rank), -0.5 * gap * rank / max(len(rows), 1)
        )
        return (found + own_term).astype(np.float32)

    def for_user(self, places: NDArray[np.int64], rows: NDArray[np.int32], scores: NDArray[np.float32]) -> "Personal":
        """Blend the order of the passages with what a ranker says of their items.

        Args:
            places: int64 [C] place in `self.rows` of each item's passage.
            rows: int32 [C] the items.
            scores: float32 [C] of the user's ranker. A passage counts by its best item.
        """
        weight, (order, blends) = self.config.personal_weight, self._parted(known=True)
        best = np.full(len(self), -np.inf, np.float32)
        np.maximum.at(best, places, scores)
        item = np.full(len(self), -1, np.int64)
        by_score = np.lexsort((rows, -scores))
        passages, first = np.unique(places[by_score], return_index=True)
        item[passages] = rows[by_score[first]]
        rank, own = _ranks(best, item >= 0), _ranks(best, blends & (item >= 0))
        total = 1.0 / (RRF_K + 1 + order)
        total += blends * weight / (RRF_K + np.where(item >= 0, own, 1 + order))  # who is no item has one rank alone
        return Personal(np.lexsort((order, -total)), total.astype(np.float32), rank, item)

    def _parted(self, known: bool) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return by place in `rows` int64 [n] the place with what is blended first, and bool [n] what is blended."""
        if not known or not self.config.personal_weight:
            return np.arange(len(self)), np.zeros(len(self), bool)
        blends = self.part.bm25.held(self.query, self.rows, self.part.passages.text) >= COVERED
        if not blends.any():
            blends = np.arange(len(self)) < self.config.personal
        order = np.empty(len(self), np.int64)
        order[np.argsort(~blends, kind="stable")] = np.arange(len(self))
        return order, blends


def _ranks(scores: NDArray[np.float32], judged: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return int64 [n] the rank of each judged score, from 1, equal ones in their order; 0 for those that are not."""
    place = np.flatnonzero(judged)
    rank = np.zeros(len(scores), np.int64)
    rank[place[np.argsort(-scores[place], kind="stable")]] = np.arange(1, len(place) + 1)
    return rank


@dataclass(frozen=True)
class Personal:
    """The found passages in the order for one user.

    Attributes:
        order: int64 [n] places in the search, best first.
        scores: float32 [n] by place.
        rank: int64 [n] by place, rank by the user's ranker alone, from 1; 0 for a passage without items.
        item: int64 [n] by place, the item of the passage that the ranker puts first, -1 without items.
    """

    order: NDArray[np.int64]
    scores: NDArray[np.float32]
    rank: NDArray[np.int64]
    item: NDArray[np.int64]


@dataclass(frozen=True)
class Reranked:
    """What became of documents that were sent along.

    Attributes:
        scores: float32 [n] in the order of the request, -inf for those there was no time for; None if for none.
        truncated: bool [n], of which only the beginning was read.
    """

    scores: NDArray[np.float32] | None
    truncated: NDArray[np.bool_]
