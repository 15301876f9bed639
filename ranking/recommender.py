"""The request path in plain Python, one stage after the other.

    history -> filters -> encode -> sources -> score -> rules -> top k

A request with a query is answered from what `ranking.searcher` found for it: that search is then the only source, and
scores blend its order with the ranker's. It is made beforehand, since its models may take long and run elsewhere.

A Serve replica, the batch job and offline evaluation are thin hosts of this one class, so their answers agree. An
item's score depends on the user's history, the moment and the item, never on which other items are scored with it;
equal scores are ordered by ascending row.

Filters come before the sources, so that every source proposes allowed items only (`ranking.filters`), and the search
goes deeper (`ranking.candidate_search`) until there are k items or nothing is left: a `shortfall` means that no further
item may be recommended, or was found for the query.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ranking.attributes import Attributes
from ranking.bundle import Bundle
from ranking.calibration import Calibration
from ranking.candidate_search import Asked, CandidateSearch, by_score, sources_in_use
from ranking.filters import Availability, Filters, seen_rows
from ranking.ladder import Budget, Ladder
from ranking.recall_watch import RecallWatch
from ranking.recommender_config import DEFAULTS, RecommenderConfig, StatesConfig
from ranking.rules import Rules
from ranking.scorer import Encoded, Scorer
from ranking.searched import Searched
from ranking.sources import Popularity, Source, SourceQuery
from ranking.state_cache import StateCache
from ranking.trace import Clock, Found, explain, stages_of
from ranking.users import User, Users
from recsys.errors import ConfigError, RequestError
from recsys.files import sha256_json
from recsys.messages import (
    MAX_CANDIDATES,
    ItemFilter,
    RankRequest,
    RankResponse,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
)
from recsys.stores import HistoryReader

__all__ = ["Recommender", "RecommenderConfig"]

GROUP = 16
"""Users encoded and scored at once: with DARE 8, 16 and 32 cost about the same per user, 64 more again."""


class Recommender:
    """Answers requests from a bundle and live histories. Safe to call from several threads.

    Args:
        bundle: models, items and index.
        histories: where the histories of user ids are read.
        config: quotas, limits, filters and rules.
        availability: what cannot be had now; None if all can.
        states: keeps the states of users with long histories; None encodes every history anew, with the same answers.
        watch: looks at the recall of some searches.

    Raises:
        ConfigError: a filter or rule names a column that the bundle does not have, or the config an action that it does
            not know.
    """

    def __init__(
        self,
        bundle: Bundle,
        histories: HistoryReader,
        config: RecommenderConfig = DEFAULTS,
        availability: Availability | None = None,
        states: StateCache | None = None,
        watch: RecallWatch | None = None,
    ) -> None:
        self.bundle = bundle
        self.histories = histories
        self.config = config
        self._settings = repr(replace(config, states=StatesConfig()))  # kept states change no answer
        self._row_of = bundle.row_of  # built here, not by the first request
        attributes = Attributes(bundle)
        self._users = Users(bundle, histories, config.history_limit)
        self._seen_actions = self._codes(config.exclude_seen_actions)
        self._filters = Filters(attributes, len(bundle.items), config.filters, availability, config.in_catalogue_only)
        self._scorer = Scorer(bundle, states)
        self._search = CandidateSearch(bundle, self._scorer, Rules(attributes, config.rules))
        popularity = Popularity(bundle.items)
        self._sources = sources_in_use(bundle, config, popularity, watch)
        self._sources_without_user: list[tuple[Source, int]] = [(popularity, config.popularity)]

    def settings_digest(self) -> str:
        """Name what answers depend on beside bundle, history and request: the config, and what cannot be had now."""
        return sha256_json([self._settings, self._filters.unavailable_digest()])[:16]

    def allowed(self, filters: Sequence[ItemFilter] = ()) -> NDArray[np.bool_] | None:
        """Return bool [V], the items that the config's filters and availability let through now; None for all.

        Args:
            filters: those of a request, which an item must pass too.

        Raises:
            RequestError: 422 for a filter of an unknown column.
        """
        return self._filters.allowed(RecommendRequest(filters=list(filters)), np.empty(0, np.int32)).mask

    def warnings(self, filters: Sequence[ItemFilter]) -> list[str]:
        """Name the values of a request's filters that no item has; raises `RequestError` as `allowed` does."""
        return self._filters.warnings(filters)

    def recommend(
        self, request: RecommendRequest, now: int, budget: Budget | None = None, searched: Searched | None = None
    ) -> RecommendResponse:
        """Return the k best items for a user or an inline history; with a query, of what was found for it.

        Args:
            request: what is asked.
            now: the moment, microseconds UTC, where the request names none.
            budget: with one, a stage that fails or is late is left out and named (`ranking.ladder`).
            searched: what was found for `request.query`: the items of its passages are then the candidates, and their
                scores blend search and ranker by rank.

        Raises:
            RequestError: 422 for neither user nor history, a moment out of range, a filter of an unknown column, or an
                unknown action to leave out; 409 for a query without a search.

        Cost: one encode, one search, one scoring of at most the sum of the quotas; further rounds of search and
        scoring only where filters and rules leave too few.
        """
        clock = Clock()
        if request.query is not None and searched is None:
            raise RequestError(
                409,
                "not_supported",
                f"bundle {self.bundle.version} searches no text; leave out `query`, or publish with `--text-encoder`",
            )
        ladder = Ladder(budget)
        asked = self._ask(request, self._user(request, now, clock, ladder), clock, ladder, searched)
        found = self._search.one(asked, clock)
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
            warnings=self.warnings(request.filters),
        )
        if request.explain:
            response = self._explained(response, asked, found, places)
        clock.lap("top_k")
        return response.model_copy(update={"timings": clock.seconds()})

    def trace(self, request: RecommendRequest, now: int) -> Found:
        """Return the search behind an answer to a request without a query, for whoever measures the stages.

        `recommend` answers from the very same search.
        """
        clock, ladder = Clock(), Ladder(None)
        return self._search.one(self._ask(request, self._user(request, now, clock, ladder), clock, ladder, None), clock)

    def trace_many(self, requests: Sequence[RecommendRequest], now: int) -> list[tuple[bool, Found]]:
        """Give, for each request, whether anything is known of its user, and what `trace` gives.

        `GROUP` users of about the same length of history are encoded, searched for and scored at once, for about half
        of what one by one costs. Scores may differ from those of `trace` in their last float32 digit, and with them the
        order of items whose scores are as close as that.
        """
        clock, ladder = Clock(), Ladder(None)
        users = [self._user(request, now, clock, ladder) for request in requests]
        found: dict[int, Found] = {}
        known = [place for place, user in enumerate(users) if user.known]
        for place in set(range(len(users))).difference(known):
            found[place] = self._search.one(self._ask(requests[place], users[place], clock, ladder, None), clock)
        known.sort(key=lambda place: len(users[place].events))
        for begin in range(0, len(known), GROUP):
            places = known[begin : begin + GROUP]
            asked = [self._ask(requests[place], users[place], clock, ladder, None, encode=False) for place in places]
            found |= zip(places, self._search.many(asked, clock), strict=True)
        return [(user.known, found[place]) for place, user in enumerate(users)]

    def rank(self, request: RankRequest, now: int, budget: Budget | None = None) -> RankResponse:
        """Return the scores of items in the order of the request, and the ranked list.

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
        ranked = dict.fromkeys(rows[by_score(rows, scores)].tolist())
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

    def told(self, scores: NDArray[np.float32], known: bool) -> NDArray[np.float32]:
        """Return the scores of `trace_many` as an answer tells them: of a known user calibrated, if the bundle is."""
        return _told(scores, self.bundle.calibration if known else None)

    def _calibration(self, encoded: Encoded | None, ladder: Ladder) -> Calibration | None:
        """Return what makes scores probabilities, where they are the ranker's own."""
        return None if encoded is None or "rank" in ladder.degraded else self.bundle.calibration

    def _ranked(
        self, user: User, encoded: Encoded | None, rows: NDArray[np.int32], ladder: Ladder
    ) -> NDArray[np.float32]:
        """Return the ranker's scores, else the retriever's, else log(1 + training events)."""
        if encoded is None:
            return self._scorer.score(None, rows)
        scores = ladder.attempt("rank", lambda: self._scorer.score(encoded, rows), None)
        if scores is None:
            scores = ladder.attempt("retrieval", lambda: self._scorer.by_retriever(user, rows), None)
        return self._scorer.score(None, rows) if scores is None else scores

    def _user(self, request: RecommendRequest, now: int, clock: Clock, ladder: Ladder) -> User:
        user = self._users.read(request.user_id, request.history, request.at, now, ladder)
        clock.lap("history")
        return user

    def _ask(
        self,
        request: RecommendRequest,
        user: User,
        clock: Clock,
        ladder: Ladder,
        searched: Searched | None,
        encode: bool = True,
    ) -> Asked:
        """Return the request with what may be answered, the sources to ask and, if wanted, the encoded user."""
        seen = seen_rows(request, user, self.config.exclude_seen_days, self._counted_as_seen(request))
        mask, blocked = self._filters.allowed(request, seen)
        clock.lap("filter")
        encoded, sources = None, self._sources_without_user
        if user.known:
            sources = self._sources
            if encode:
                encoded = self._scorer.encode(user, ladder)
                clock.lap("encode")
        if searched is not None:
            sources = [(searched, len(searched))]
        vector = None if encoded is None else encoded.vector
        query = SourceQuery(user.rows, user.events.time, user.at, vector, mask, blocked, request.query)
        return Asked(request, user, seen, encoded, query, sources, ladder, searched)

    def _counted_as_seen(self, request: RecommendRequest) -> NDArray[np.uint8] | None:
        if request.exclude_seen_actions is None:
            return self._seen_actions
        try:
            return self._codes(request.exclude_seen_actions)
        except ConfigError as error:
            raise RequestError(422, "unknown_action", str(error)) from None

    def _codes(self, actions: Sequence[str]) -> NDArray[np.uint8] | None:
        """Return the codes of actions, None for no action; raises `ConfigError` for one the bundle does not know."""
        known = [action for action in self.bundle.manifest.actions if action]
        for action in actions:
            if action not in known:
                names = ", ".join(map(repr, known)) or "none"
                raise ConfigError(f"exclude_seen_actions: no action {action!r} in the bundle; there are {names}")
        return np.array([self.bundle.action_of(action) for action in actions], np.uint8) if actions else None

    def _explained(
        self, response: RecommendResponse, asked: Asked, found: Found, places: NDArray[np.int64]
    ) -> RecommendResponse:
        """Add where every item stood, and why what the sources would propose without filters is not in the answer."""
        request = asked.request
        items = [
            item.model_copy(update={"stages": stages_of(found, place)})
            for item, place in zip(response.items, places.tolist(), strict=True)
        ]
        free = replace(asked.query, allowed=None, blocked=0)
        rows = self._search.proposed(asked, free, 1).rows
        reasons = self._filters.reasons(request, asked.seen, rows)
        filtered = [(row, reason) for row, reason in zip(rows.tolist(), reasons, strict=True) if reason is not None]
        explanation = explain(found, places, filtered, self.bundle.item_ids)
        return response.model_copy(update={"items": items, "explanation": explanation})


def _told(scores: NDArray[np.float32], calibration: Calibration | None) -> NDArray[np.float32]:
    """Return the scores as an answer tells them; what is ordered is ordered before."""
    return scores if calibration is None else calibration.of(scores).astype(np.float32)
