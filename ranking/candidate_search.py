"""The search for what to recommend: propose, score, choose, in rounds.

Where rules leave fewer than k, or the sources have no more, the search goes deeper among what is neither scored yet nor
full, until there are k or nothing is left. The first round can be made for many users at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from ranking.ladder import Ladder, retriever_order
from ranking.ranker import NEGATIVE
from ranking.recall_watch import RecallWatch
from ranking.recommender_config import RecommenderConfig
from ranking.rules import Rules
from ranking.scorer import Encoded, Scorer
from ranking.searched import Searched
from ranking.sources import (
    Catalogue,
    Followers,
    NewItems,
    Pool,
    Popularity,
    Proposal,
    Repeats,
    Retrieval,
    Source,
    SourceQuery,
    merge,
)
from ranking.trace import Clock, Found
from ranking.users import User
from recsys.messages import RecommendRequest

DEEPER = 4
"""How many times more each further round of a search asks of every source."""


@dataclass(frozen=True)
class Asked:
    """A request and what the first stages made of it.

    Attributes:
        request: what is asked.
        user: who asks.
        seen: rows that are left out because the user has seen them.
        encoded: the user as the models see it; None where nothing is known, or where it is encoded with others.
        query: what the sources may look at.
        sources: each with its quota.
        ladder: what is left out where a stage fails or is late.
        searched: what was found for the request's text.
    """

    request: RecommendRequest
    user: User
    seen: NDArray[np.int32]
    encoded: Encoded | None
    query: SourceQuery
    sources: Sequence[tuple[Source, int]]
    ladder: Ladder
    searched: Searched | None


class CandidateSearch:
    """Finds the k best items for a request.

    Args:
        bundle: models, items and index.
        scorer: scores candidates.
        rules: choose among them.
    """

    def __init__(self, bundle: Bundle, scorer: Scorer, rules: Rules) -> None:
        self._items = bundle.items
        self._scorer = scorer
        self._rules = rules
        self._catalogue = Catalogue(bundle.items)

    def many(self, asked: Sequence[Asked], clock: Clock) -> list[Found]:
        """Encode, propose and score for several known users at once; further rounds are made one by one."""
        encoded = self._scorer.encode_many([one.user for one in asked])
        clock.lap("encode")
        if encoded.vectors is not None:
            vectors = np.split(encoded.vectors, len(asked))
            asked = [
                replace(one, query=replace(one.query, vector=vector))
                for one, vector in zip(asked, vectors, strict=True)
            ]
        pools = self._proposed_many(asked)
        clock.lap("sources")
        scores = self._scorer.score_many(encoded, [pool.rows for pool in pools])
        clock.lap("score")
        first = zip(pools, scores, strict=True)
        return [self.one(one, clock, begun) for one, begun in zip(asked, first, strict=True)]

    def one(self, asked: Asked, clock: Clock, first: tuple[Pool, NDArray[np.float32]] | None = None) -> Found:
        """Propose, score and choose, in further rounds until there are k or no item is left that may be taken.

        `first` are what was proposed in the first round and its scores, where that was done for many users at once.
        """
        k, query, rounds = asked.request.k, asked.query, 0
        pool = merge([Proposal.none()] * (len(asked.sources) + 1))
        scores = np.empty(0, np.float32)
        unscored = np.empty(0, np.int32)
        while True:
            rounds += 1
            if first is not None and rounds == 1:
                fresh, new = first
            else:
                fresh = self.proposed(asked, query, rounds)
                clock.lap("sources")
                new = self._scores(asked, fresh, scores)
            scorable = new > NEGATIVE
            if asked.searched is not None:
                new = np.where(scorable, asked.searched.blended(fresh.rows, new, asked.user.known), new)
            unscored = np.concatenate([unscored, fresh.rows[~scorable]])
            pool, scores = pool.joined(fresh.take(scorable)), np.concatenate([scores, new[scorable]])
            order = by_score(pool.rows, scores)
            pool, scores = pool.take(order), scores[order]
            clock.lap("score")
            chosen = self._rules.select(pool.rows, k)
            if len(chosen.places) < k:
                query = self._narrowed(asked.query, np.concatenate([pool.rows, unscored]), chosen.full)
            clock.lap("rules")
            ended = len(chosen.places) >= k or query.blocked == len(self._items) or asked.searched is not None
            if ended or asked.ladder.give_up_if_late("search"):
                names = [*(source.name for source, _ in asked.sources), self._catalogue.name]
                return Found(names, pool, scores, chosen, unscored, rounds)

    def _scores(self, asked: Asked, fresh: Pool, before: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the ranker's scores, else scores below those before that keep the retriever's order."""
        if not asked.user.known:
            return self._scorer.score(None, fresh.rows)
        encoded = asked.encoded
        if encoded is None:  # one of many, encoded with others so far
            encoded = self._scorer.encode(asked.user, asked.ladder)
        scores = asked.ladder.attempt("rank", lambda: self._scorer.score(encoded, fresh.rows), None)
        if scores is not None:
            return scores
        names = [source.name for source, _ in asked.sources]
        retrieval = names.index(Retrieval.name) if Retrieval.name in names else None
        return retriever_order(fresh, retrieval, float(before.min(initial=0.0)))

    def _proposed_many(self, asked: Sequence[Asked]) -> list[Pool]:
        """Return what the sources propose in the first round; the index is searched for all at once."""
        given: list[dict[str, Proposal]] = [{} for _ in asked]
        for source, quota in asked[0].sources:
            if isinstance(source, Retrieval):
                limits = [max(quota, one.request.k) for one in asked]
                nearest = source.propose_many([one.query for one in asked], limits)
                given = [{source.name: proposal} for proposal in nearest]
        return [self.proposed(one, one.query, 1, known) for one, known in zip(asked, given, strict=True)]

    def proposed(
        self, asked: Asked, query: SourceQuery, rounds: int, given: Mapping[str, Proposal] = MappingProxyType({})
    ) -> Pool:
        """Return what the sources propose; from the second round on the whole catalogue is one of them.

        Args:
            asked: the request.
            query: what the sources may look at in this round.
            rounds: its number, from 1.
            given: what was proposed already, by source.
        """
        k, deeper = asked.request.k, DEEPER ** (rounds - 1)
        proposals = [
            given[source.name]
            if source.name in given
            else _proposal(source, query, max(quota, k) * deeper, asked.ladder)
            for source, quota in asked.sources
        ]
        proposals.append(Proposal.none() if rounds == 1 else self._catalogue.propose(query, k * deeper))
        pool = merge(proposals)
        keep = pool.rows >= FIRST_ITEM
        if query.allowed is not None:
            keep &= query.allowed[pool.rows]  # a source that did not keep to it must not pass either
        return pool if keep.all() else pool.take(keep)

    def _narrowed(self, query: SourceQuery, scored: NDArray[np.int32], full: Sequence[tuple[int, int]]) -> SourceQuery:
        """Return the first query without what is scored and what is full now: better items may free a place again."""
        allowed = np.ones(len(self._items), bool) if query.allowed is None else query.allowed.copy()
        allowed[:FIRST_ITEM] = False
        allowed[scored] = False
        self._rules.without(allowed, full)
        return replace(query, allowed=allowed, blocked=len(allowed) - int(np.count_nonzero(allowed)))


def sources_in_use(
    bundle: Bundle, config: RecommenderConfig, popularity: Popularity, watch: RecallWatch | None
) -> list[tuple[Source, int]]:
    """Return each source in use with its quota."""
    sources: list[tuple[Source, int]] = [
        (Repeats(config.half_life_days), config.repeats),
        (Followers(bundle.items, config.recent_items, config.edges_per_item), config.transitions),
        (popularity, config.popularity),
    ]
    if bundle.index is not None:
        sources.insert(0, (Retrieval(bundle.index, watch), config.retrieval))
    if bundle.content is not None:
        sources.append((NewItems(bundle.content), config.new_items))
    return [(source, quota) for source, quota in sources if quota]


def _proposal(source: Source, query: SourceQuery, limit: int, ladder: Ladder) -> Proposal:
    """Return what a source proposes; nothing of a retriever that is out, whose index may be in another process."""
    if source.name != Retrieval.name:
        return source.propose(query, limit)
    return ladder.attempt("retrieval", lambda: source.propose(query, limit), Proposal.none())


def by_score(rows: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Best first, equal scores by ascending row."""
    order: NDArray[np.int64] = np.lexsort((rows, -scores))
    return order
