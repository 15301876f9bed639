"""The request path in plain Python, one stage after the other.

    history -> filters -> encode -> sources -> score -> rules -> top k

A request with a query is answered from what `ranking.searcher` found for it: that search is then the only source, and
scores blend its order with the ranker's. It is made beforehand, since its models may take long and run elsewhere.

A Serve replica, the batch job and offline evaluation are thin hosts of this one class, so their answers agree. An
item's score depends on the user's history, the moment and the item, never on which other items are scored with it;
equal scores are ordered by ascending row.

Filters come before the sources, so that every source proposes allowed items only (`ranking.filters`). Where rules leave
fewer than k, or the sources have no more, the search goes deeper among what is neither scored yet nor full, until there
are k or nothing is left: a `shortfall` means that no further item may be recommended, or was found for the query.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ranking.attributes import Attributes
from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from ranking.calibration import Calibration
from ranking.filters import Availability, Filters, seen_rows
from ranking.ladder import Budget, Ladder, retriever_order
from ranking.ranker import NEGATIVE
from ranking.recall_watch import RecallWatch
from ranking.recommender_config import DEFAULTS, RecommenderConfig
from ranking.rules import Rules
from ranking.scorer import Encoded, Scorer
from ranking.searcher import Searched
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
from ranking.state_cache import StateCache
from ranking.trace import Clock, Found, explain, stages_of
from ranking.users import LATEST, User, Users
from recsys.errors import RequestError
from recsys.messages import (
    MAX_CANDIDATES,
    RankRequest,
    RankResponse,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
)
from recsys.stores import HistoryReader

__all__ = ["LATEST", "Recommender", "RecommenderConfig"]

DEEPER = 4
"""How many times more each further round of a search asks of every source."""


@dataclass(frozen=True)
class _Asked:
    """A request and what the first stages made of it."""

    request: RecommendRequest
    user: User
    seen: NDArray[np.int32]
    encoded: Encoded | None  # None where nothing is known of the user
    query: SourceQuery
    sources: Sequence[tuple[Source, int]]
    ladder: Ladder
    searched: Searched | None  # what was found for the request's text


class Recommender:
    """Answers requests from a bundle and live histories. Safe to call from several threads.

    Args:
        bundle: models, items and index.
        histories: where the histories of user ids are read.
        config: quotas, limits, filters and rules.
        availability: what cannot be had now; None if all can.
        more_sources: further sources, each with its quota.
        states: keeps the states of users with long histories; None encodes every history anew, with the same answers.
        watch: looks at the recall of some searches.

    Raises:
        ConfigError: a filter or rule names a column that the bundle does not have.
    """

    def __init__(
        self,
        bundle: Bundle,
        histories: HistoryReader,
        config: RecommenderConfig = DEFAULTS,
        availability: Availability | None = None,
        more_sources: Sequence[tuple[Source, int]] = (),
        states: StateCache | None = None,
        watch: RecallWatch | None = None,
    ) -> None:
        self.bundle = bundle
        self.histories = histories
        self.config = config
        self._row_of = bundle.row_of  # built here, not by the first request
        attributes = Attributes(bundle)
        self._users = Users(bundle, histories, config.history_limit)
        self._filters = Filters(attributes, len(bundle.items), config.filters, availability)
        self._rules = Rules(attributes, config.rules)
        self._scorer = Scorer(bundle, states)
        popularity = Popularity(bundle.items)
        self._catalogue = Catalogue(bundle.items)
        self._sources = [*_sources(bundle, config, popularity, watch), *more_sources]
        self._sources_without_user: list[tuple[Source, int]] = [(popularity, config.popularity)]

    def recommend(
        self, request: RecommendRequest, now: int, budget: Budget | None = None, searched: Searched | None = None
    ) -> RecommendResponse:
        """Give the k best items for a user or an inline history; with a query, of what was found for it.

        Args:
            request: what is asked.
            now: the moment, microseconds UTC, where the request names none.
            budget: with one, a stage that fails or is late is left out and named (`ranking.ladder`).
            searched: what was found for `request.query`: the items of its passages are then the candidates, and their
                scores blend search and ranker by rank.

        Raises:
            RequestError: 422 for neither user nor history, a moment out of range, or a filter of an unknown column;
                501 for a query without a search.

        Cost: one encode, one search, one scoring of at most the sum of the quotas; further rounds of search and
        scoring only where filters and rules leave too few.
        """
        clock = Clock()
        if request.query is not None and searched is None:
            raise RequestError(
                501,
                "not_supported",
                f"bundle {self.bundle.version} searches no text; leave out `query`, or publish with `--text-encoder`",
            )
        asked = self._ask(request, now, clock, Ladder(budget), searched)
        found = self._search(asked, clock)
        places = found.chosen.places[: request.k]
        calibration = self._calibration(asked.encoded, asked.ladder) if searched is None else None
        scores = _told(found.scores[places], calibration)
        items = [
            RecommendedItem(
                item_id=self.bundle.item_ids[row],
                name=self.bundle.names[row],
                score=score,
                sources=found.sources_of(place),
            )
            for place, row, score in zip(
                places.tolist(), found.pool.rows[places].tolist(), scores.tolist(), strict=True
            )
        ]
        response = RecommendResponse(
            items=items,
            shortfall=request.k - len(items),
            user_known=asked.user.known,
            history_events=len(asked.user.events),
            candidates=len(found.pool),
            calibrated=calibration is not None,
            model_version=self.bundle.version,
            degraded=[*(() if searched is None else searched.degraded), *asked.ladder.degraded],
            timings={},
        )
        if request.explain:
            response = self._explained(response, asked, found, places)
        clock.lap("top_k")
        return response.model_copy(update={"timings": clock.seconds()})

    def trace(self, request: RecommendRequest, now: int) -> Found:
        """Give the search behind an answer to a request without a query, for whoever measures the stages.

        `recommend` answers from the very same search.
        """
        clock = Clock()
        return self._search(self._ask(request, now, clock, Ladder(None), None), clock)

    def rank(self, request: RankRequest, now: int, budget: Budget | None = None) -> RankResponse:
        """Give the scores of items in the order of the request, and the ranked list.

        An item the bundle does not know has no score and is listed in `unknown_item_ids`; an item asked twice is
        scored twice and listed once. Where nothing is known of the user, scores are log(1 + training events).

        Args:
            request: what is asked.
            now: the moment, microseconds UTC, where the request names none.
            budget: with one, a ranker that fails or is late is replaced by the retriever, else by popularity.

        Raises:
            RequestError: 413 for more than `MAX_CANDIDATES` items; 422 for neither user nor history, or a moment out
                of range.
        """
        if len(request.item_ids) > MAX_CANDIDATES:
            raise RequestError(
                413,
                "too_many_candidates",
                f"{len(request.item_ids)} items to rank; at most {MAX_CANDIDATES} are taken at once",
            )
        clock, ladder = Clock(), Ladder(budget)
        user = self._users.read(request.user_id, request.history, request.at, now, ladder)
        clock.lap("history")
        found = [self._row_of.get(item) for item in request.item_ids]
        rows = np.array([row for row in found if row is not None], np.int32)
        encoded = None
        if user.known and len(rows):
            encoded = self._scorer.encode_ranker(user, ladder)
            clock.lap("encode")
        scores = self._ranked(user, encoded, rows, ladder)
        clock.lap("score")
        calibration = self._calibration(encoded, ladder)
        given = iter(_told(scores, calibration).tolist())
        item_ids = self.bundle.item_ids
        ranked = dict.fromkeys(rows[_order(rows, scores)].tolist())
        unknown = [item for item, row in zip(request.item_ids, found, strict=True) if row is None]
        clock.lap("top_k")
        return RankResponse(
            scores=[None if row is None else next(given) for row in found],
            ranked=[item_ids[row] for row in ranked],
            unknown_item_ids=list(dict.fromkeys(unknown)),
            user_known=user.known,
            history_events=len(user.events),
            calibrated=calibration is not None,
            model_version=self.bundle.version,
            degraded=ladder.degraded,
            timings=clock.seconds(),
        )

    def _calibration(self, encoded: Encoded | None, ladder: Ladder) -> Calibration | None:
        """Give what makes scores probabilities, where they are the ranker's own."""
        return None if encoded is None or "rank" in ladder.degraded else self.bundle.calibration

    def _ranked(
        self, user: User, encoded: Encoded | None, rows: NDArray[np.int32], ladder: Ladder
    ) -> NDArray[np.float32]:
        """Give the ranker's scores, else the retriever's, else log(1 + training events)."""
        if encoded is None:
            return self._scorer.score(None, rows)
        scores = ladder.attempt("rank", lambda: self._scorer.score(encoded, rows), None)
        if scores is None:
            scores = ladder.attempt("retrieval", lambda: self._scorer.by_retriever(user, rows), None)
        return self._scorer.score(None, rows) if scores is None else scores

    def _ask(
        self, request: RecommendRequest, now: int, clock: Clock, ladder: Ladder, searched: Searched | None
    ) -> _Asked:
        """Read the user, join the filters, encode."""
        user = self._users.read(request.user_id, request.history, request.at, now, ladder)
        clock.lap("history")
        seen = seen_rows(request, user, self.config.exclude_seen_days)
        mask, blocked = self._filters.allowed(request, seen)
        clock.lap("filter")
        encoded, sources = None, self._sources_without_user
        if user.known:
            encoded, sources = self._scorer.encode(user, ladder), self._sources
            clock.lap("encode")
        if searched is not None:
            sources = [(searched, len(searched))]
        vector = None if encoded is None else encoded.vector
        query = SourceQuery(user.rows, user.events.time, user.at, vector, mask, blocked, request.query)
        return _Asked(request, user, seen, encoded, query, sources, ladder, searched)

    def _search(self, asked: _Asked, clock: Clock) -> Found:
        """Propose, score and choose, in further rounds until there are k or no item is left that may be taken."""
        k, query, rounds = asked.request.k, asked.query, 0
        pool = merge([Proposal.none()] * (len(asked.sources) + 1))
        scores = np.empty(0, np.float32)
        unscored = np.empty(0, np.int32)
        while True:
            rounds += 1
            fresh = self._proposed(asked.sources, query, k, rounds, asked.ladder)
            clock.lap("sources")
            new = self._scores(asked, fresh, scores)
            scorable = new > NEGATIVE
            if asked.searched is not None:
                new = np.where(scorable, asked.searched.blended(fresh.rows, new, asked.user.known), new)
            unscored = np.concatenate([unscored, fresh.rows[~scorable]])
            pool, scores = pool.joined(fresh.take(scorable)), np.concatenate([scores, new[scorable]])
            order = _order(pool.rows, scores)
            pool, scores = pool.take(order), scores[order]
            clock.lap("score")
            chosen = self._rules.select(pool.rows, k)
            if len(chosen.places) < k:
                query = self._narrowed(query, np.concatenate([pool.rows, unscored]), chosen.full)
            clock.lap("rules")
            ended = len(chosen.places) >= k or query.blocked == len(self.bundle.items) or asked.searched is not None
            if ended or asked.ladder.late("search"):
                names = [*(source.name for source, _ in asked.sources), self._catalogue.name]
                return Found(names, pool, scores, chosen, unscored, rounds)

    def _scores(self, asked: _Asked, fresh: Pool, before: NDArray[np.float32]) -> NDArray[np.float32]:
        """Give the ranker's scores, else scores below those before that keep the retriever's order."""
        if asked.encoded is None:
            return self._scorer.score(None, fresh.rows)
        scores = asked.ladder.attempt("rank", lambda: self._scorer.score(asked.encoded, fresh.rows), None)
        if scores is not None:
            return scores
        names = [source.name for source, _ in asked.sources]
        retrieval = names.index(Retrieval.name) if Retrieval.name in names else None
        return retriever_order(fresh, retrieval, float(before.min(initial=0.0)))

    def _proposed(
        self, sources: Sequence[tuple[Source, int]], query: SourceQuery, k: int, rounds: int, ladder: Ladder
    ) -> Pool:
        """Give what the sources propose; from the second round on the whole catalogue is one of them."""
        deeper = DEEPER ** (rounds - 1)
        proposals = [_proposal(source, query, max(quota, k) * deeper, ladder) for source, quota in sources]
        proposals.append(Proposal.none() if rounds == 1 else self._catalogue.propose(query, k * deeper))
        pool = merge(proposals)
        keep = pool.rows >= FIRST_ITEM
        if query.allowed is not None:
            keep &= query.allowed[pool.rows]  # a source that did not keep to it must not pass either
        return pool if keep.all() else pool.take(keep)

    def _narrowed(self, query: SourceQuery, scored: NDArray[np.int32], full: Sequence[tuple[int, int]]) -> SourceQuery:
        """Give the query for what is neither scored yet nor full."""
        allowed = np.ones(len(self.bundle.items), bool) if query.allowed is None else query.allowed.copy()
        allowed[:FIRST_ITEM] = False
        allowed[scored] = False
        self._rules.without(allowed, full)
        return replace(query, allowed=allowed, blocked=len(allowed) - int(np.count_nonzero(allowed)))

    def _explained(
        self, response: RecommendResponse, asked: _Asked, found: Found, places: NDArray[np.int64]
    ) -> RecommendResponse:
        """Add where every item stood, and why what the sources would propose without filters is not in the answer."""
        request = asked.request
        items = [
            item.model_copy(update={"stages": stages_of(found, place)})
            for item, place in zip(response.items, places.tolist(), strict=True)
        ]
        free = replace(asked.query, allowed=None, blocked=0)
        rows = self._proposed(asked.sources, free, request.k, 1, asked.ladder).rows
        reasons = self._filters.reasons(request, asked.seen, rows)
        filtered = [(row, reason) for row, reason in zip(rows.tolist(), reasons, strict=True) if reason is not None]
        explanation = explain(found, places, filtered, self.bundle.item_ids)
        return response.model_copy(update={"items": items, "explanation": explanation})


def _sources(
    bundle: Bundle, config: RecommenderConfig, popularity: Popularity, watch: RecallWatch | None
) -> list[tuple[Source, int]]:
    """Give each source in use with its quota."""
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
    """Give what a source proposes; nothing of a retriever that is out, whose index may be in another process."""
    if source.name != Retrieval.name:
        return source.propose(query, limit)
    return ladder.attempt("retrieval", lambda: source.propose(query, limit), Proposal.none())


def _told(scores: NDArray[np.float32], calibration: Calibration | None) -> NDArray[np.float32]:
    """Give the scores as an answer tells them; what is ordered is ordered before."""
    return scores if calibration is None else calibration.of(scores).astype(np.float32)


def _order(rows: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Best first, equal scores by ascending row."""
    order: NDArray[np.int64] = np.lexsort((rows, -scores))
    return order
