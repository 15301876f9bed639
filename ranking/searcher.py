"""Text search in stages: words and vectors -> one order -> rerank of its head -> blend with the user's ranker.

    bm25     words of the query in the passages                     best `depth`
    dense    inner product of query and passage vectors             best `depth`
    hybrid   both: a convex sum whose weight depends on how much of the query one passage holds, or reciprocal ranks
    rerank   the reranker orders the best `rerank` anew; what lies below stays as it was. Where one passage holds nearly
             all words of the query the first stage decides: a reranker only loses there
    blend    for a user: 1 / (60 + rank of the search) + personal_weight / (60 + rank by the ranker)

Service, batch job and evaluation use this one class. A request has a time budget. Work stops when it is over, between
forward passes of a few documents, and the answer is that of the stages before; `degraded` names what was left out. With
a budget a stage that fails is left out too; without one, as in evaluation, an error is an error. A blend reads ranks
alone, since scores of a reranker and of a ranker have nothing in common.

    P passages    n passages found    C candidate items
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ranking.deadline import Deadline, OutOfTimeError
from ranking.fusion import COVERED, POOL, RRF_K, Ranking
from ranking.search_part import SHIFT, SearchPart
from ranking.sources import Proposal, SourceQuery
from ranking.text_backbone import TextTokenizer
from ranking.trace import Clock
from recsys.errors import ConfigError, RequestError
from recsys.messages import MAX_CANDIDATES
from recsys.search_messages import Mode

logger = logging.getLogger(__name__)

SHARE = 0.7
"""of a search's budget is for the reranker; the rest for the first stage, the user's ranker, and a busier machine"""
LEAST = 2
"""Passages that are reranked however slow the machine is: fewer have no order."""
CHARACTERS_PER_TOKEN = 32
"""No tokenizer needs more text for a token; what lies beyond is cut before it is looked at."""


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
    budget_ms: int = 1_000
    """time of a search that names none"""
    rerank_budget_ms: int = 30_000
    """time of a rerank request that names none"""

    def __post_init__(self) -> None:
        for name in ("depth", "items_per_passage"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[search] {name} is {getattr(self, name)}; expected at least 1")
        for name in ("rerank", "personal_weight", "budget_ms", "rerank_budget_ms"):
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
        part: where the passages are from.
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
    part: SearchPart
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
        rank = np.empty(len(rows), np.int64)
        rank[np.lexsort((rows, -scores))] = np.arange(len(rows))
        found = 1.0 / (RRF_K + 1 + place[rows])
        if known:
            return (found + self.config.personal_weight / (RRF_K + 1 + rank)).astype(np.float32)
        gap = 1.0 / ((RRF_K + len(self)) * (RRF_K + 1 + len(self)))  # the least between two passages
        return (found - 0.5 * gap * rank / max(len(rows), 1)).astype(np.float32)

    def for_user(self, places: NDArray[np.int64], rows: NDArray[np.int32], scores: NDArray[np.float32]) -> "Personal":
        """Blend the order of the passages with what a ranker says of their items.

        Args:
            places: int64 [C] place in `self.rows` of each item's passage.
            rows: int32 [C] the items.
            scores: float32 [C] of the user's ranker. A passage counts by its best item.
        """
        best = np.full(len(self), -np.inf, np.float32)
        np.maximum.at(best, places, scores)
        item = np.full(len(self), -1, np.int64)
        by_score = np.lexsort((rows, -scores))
        passages, first = np.unique(places[by_score], return_index=True)
        item[passages] = rows[by_score[first]]
        judged = np.flatnonzero(item >= 0)
        order = judged[np.lexsort((judged, -best[judged]))]
        rank = np.zeros(len(self), np.int64)
        rank[order] = np.arange(1, len(order) + 1)
        total = 1.0 / (RRF_K + 1 + np.arange(len(self)))
        total[judged] += self.config.personal_weight / (RRF_K + rank[judged])
        return Personal(np.lexsort((np.arange(len(self)), -total)), total.astype(np.float32), rank, item)


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
        scores: float32 [n] in the order of the request; None if there was no time.
        truncated: bool [n], of which only the beginning was read.
    """

    scores: NDArray[np.float32] | None
    truncated: NDArray[np.bool_]


class Searcher:
    """Searches the passages of a bundle. Keeps no state between requests; safe to call from several threads.

    Args:
        part: of the bundle.
        config: depths and budgets.
        pace: seconds the reranker takes for a passage on this machine (`ranking.rerank_depth`); 0 is not known.
    """

    def __init__(self, part: SearchPart, config: SearchConfig = SearchConfig(), pace: float = 0.0) -> None:
        self.part = part
        self.config = config
        self.pace = pace

    def rerank_depth(self, seconds: float) -> int:
        """Return how many passages a search of so many seconds reranks: what fits in `SHARE` of them."""
        if self.pace <= 0 or self.config.rerank <= LEAST:
            return self.config.rerank
        return max(LEAST, int(min(self.config.rerank, SHARE * seconds / self.pace)))

    def deadline(self, budget_ms: int | None) -> Deadline:
        """Start the clock of a search."""
        return Deadline((self.config.budget_ms if budget_ms is None else budget_ms) / 1e3)

    def search(
        self, query: str, deadline: Deadline | None = None, mode: Mode | None = None, rerank: bool | None = None
    ) -> Searched:
        """Return the passages found for a query, best first.

        Args:
            query: the text.
            deadline: when to stop; None takes the time it needs, as evaluation does.
            mode: first stage; the best the bundle has if absent.
            rerank: whether the head is reranked, if the bundle has a reranker; None leaves it to the query: where one
                passage covers it the first stage decides, unless `rerank_covered`.

        Raises:
            RequestError: 409 for vectors from a bundle without an encoder.
        """
        clock = Clock()
        degraded: list[str] = []
        ranking, used, covered = self._first_stage(query, mode, deadline, degraded, clock)
        rows = ranking.rows[0][ranking.rows[0] >= 0]
        found = Searched(
            rows=rows,
            scores=ranking.scores[0][: len(rows)],
            first=np.arange(1, len(rows) + 1),
            reranked=0,
            truncated=np.zeros(len(rows), bool),
            mode=used,
            degraded=(),
            timings={},
            covered=False,
            part=self.part,
            config=self.config,
        )
        if rerank is not False and self.part.reranker is not None and self.config.rerank and len(rows):
            if rerank is None and covered and not self.config.rerank_covered:
                found = replace(found, covered=True)
            else:
                found = self._reranked(found, query, deadline, degraded)
                clock.lap("rerank")
        return replace(found, degraded=tuple(degraded), timings=clock.seconds())

    def rerank(
        self, query: str, documents: Sequence[str], max_tokens: int, deadline: Deadline | None = None
    ) -> Reranked:
        """Score documents that were sent along, by the reranker, or by the encoder's cosine where there is none.

        Raises:
            RequestError: 409 for a bundle with neither.
        """
        part = self.part
        if part.tokenizer is None:
            raise RequestError(
                409, "not_supported", "the bundle has no text model; publish one with `--text-encoder` or `--reranker`"
            )
        try:
            passages, cut = shortened(part.tokenizer, documents, max_tokens, deadline)
            check = None if deadline is None else deadline.check
            if deadline is not None:
                deadline.check(0, len(documents))
            if part.reranker is not None:
                scores = part.reranker.rerank(query, passages, check)
                return Reranked(scores, cut | part.reranker.truncated(query, passages))
            assert part.encoder is not None, "a tokenizer comes with a model"
            vector = part.encoder.encode_queries([query])
            scores = part.encoder.encode_passages(passages, check) @ vector[0]
            return Reranked(scores, cut | part.encoder.truncated(passages))
        except OutOfTimeError:
            return Reranked(None, np.zeros(len(documents), bool))

    def _first_stage(
        self, query: str, mode: Mode | None, deadline: Deadline | None, degraded: list[str], clock: Clock
    ) -> tuple[Ranking, Mode, bool]:
        part, depth = self.part, self.config.depth
        if part.encoder is None or part.index is None:
            if mode in ("dense", "hybrid"):
                raise RequestError(
                    409, "not_supported", f"mode {mode!r} needs vectors; publish the bundle with `--text-encoder`"
                )
            mode = "bm25"
        mode = mode or "hybrid"
        if mode == "hybrid" and deadline is not None and deadline.left <= 0:
            degraded.append("dense")
            mode = "bm25"
        lexical = dense = None
        coverage = np.zeros(1)
        places = max(depth, POOL) if mode == "hybrid" else depth
        if mode != "dense":
            lexical = part.bm25.search([query], places)
            coverage = part.bm25.coverage([query], lexical)
            clock.lap("bm25")
        if mode != "bm25":
            try:
                dense = self._dense(query, places, clock)
            except Exception:
                if deadline is None or lexical is None:
                    raise
                logger.exception("vectors failed; the answer goes by words alone")
                degraded.append("dense")
                mode = "bm25"
        if lexical is None or dense is None:
            found = lexical if dense is None else dense
            assert found is not None, "every mode has a first stage"
            return found.top(depth), mode, bool(coverage[0] >= COVERED)
        found = part.mix.fuse(lexical, dense, coverage, depth)
        clock.lap("fuse")
        return found, mode, bool(coverage[0] >= COVERED)

    def _dense(self, query: str, depth: int, clock: Clock) -> Ranking:
        encoder, index = self.part.encoder, self.part.index
        assert encoder is not None, "asked for only where there are vectors"
        assert index is not None
        vector = encoder.encode_queries([query])
        clock.lap("encode_query")
        rows, scores = index.search(vector, min(depth, len(index)))
        clock.lap("dense")
        return Ranking(rows - SHIFT, scores)

    def _reranked(self, found: Searched, query: str, deadline: Deadline | None, degraded: list[str]) -> Searched:
        """Order the head anew, or leave it and say so if there is no time for it."""
        reranker = self.part.reranker
        assert reranker is not None, "asked for only where there is one"
        depth = self.config.rerank
        if deadline is not None and self.pace > 0:
            depth = self.rerank_depth(min(deadline.seconds, deadline.left / SHARE))  # after a long queue less is left
        head = found.rows[:depth]
        texts = [self.part.passages.text(row) for row in head.tolist()]
        try:
            if deadline is not None:
                deadline.check(0, len(texts))
            scores = reranker.rerank(query, texts, None if deadline is None else deadline.check)
        except OutOfTimeError:
            degraded.append("rerank")
            return found
        except Exception:
            if deadline is None:
                raise
            logger.exception("the reranker failed; the answer does without")
            degraded.append("rerank")
            return found
        order = np.argsort(-scores, kind="stable")
        every = np.concatenate([order, np.arange(len(head), len(found))])
        truncated = found.truncated.copy()
        truncated[: len(head)] = reranker.truncated(query, texts)
        return replace(
            found,
            rows=found.rows[every],
            scores=np.concatenate([scores[order], found.scores[len(head) :]]),
            first=found.first[every],
            truncated=truncated[every],
            reranked=len(head),
        )


def shortened(
    tokenizer: TextTokenizer, texts: Sequence[str], tokens: int, deadline: Deadline | None = None
) -> tuple[list[str], NDArray[np.bool_]]:
    """Cut texts after so many tokens; gives them and bool [n], which were cut."""
    cut = np.zeros(len(texts), bool)
    short = list(texts)
    for place, given in enumerate(texts):
        if deadline is not None:
            deadline.check(place, len(texts))
        text = given
        most = tokens * CHARACTERS_PER_TOKEN
        if len(text) > most:  # blanks are no tokens, and there may be any number of them
            text = " ".join(text.split())
        if len(text) <= tokens:  # a token has a character at least
            continue
        offsets = tokenizer.tokenizer.encode(text[:most], add_special_tokens=False).offsets
        cut[place] = len(offsets) > tokens or len(text) > most
        if cut[place]:
            short[place] = text[: offsets[tokens - 1][1]] if len(offsets) >= tokens else text[:most]
    return short, cut
