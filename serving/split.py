"""The `split` topology: models run in deployments of their own, everything else of a request in the ingress.

    ingress     histories, filters, the sources beside the retriever, rules, events     `serving.deployment.Replica`
    retriever   user vectors, and the index over the item vectors
    ranker      states and scores
    text        whole searches, and documents sent along for reranking

The ingress holds the same bundle as when all is fused, but each model in it is a stand-in that asks its part. So the
stages of `ranking` are the same code and the answers are the same, whatever runs them. A part that is out is a stage
that fails (`ranking.ladder`). Kept states (`ranking.state_cache`) stay unused: a state lives within one score.

Nothing here knows Ray: `Ask` is how words get to a part.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranking.batch import Candidates, History, Request
from ranking.bundle import Bundle
from ranking.deadline import Deadline
from ranking.devices import pick_device
from ranking.index import Index
from ranking.items import ItemTable
from ranking.ranker import Retriever
from ranking.rerank_depth import paced
from ranking.searched import Reranked, SearchConfig, Searched
from ranking.searcher import Searcher
from recsys.errors import BundleError, ConfigError, RequestError
from recsys.search_messages import Mode
from serving.lineup import BundlePlace, Plan

Part = Literal["retriever", "ranker", "text"]
PARTS: tuple[Part, ...] = get_args(Part)
Spent = tuple[float, float] | None
"""A deadline on its way to another process: its seconds, and how many of them are over."""
Neighbours = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Rows and scores of an index."""

VECTOR_BYTES = 2 * 2**20
"""Of item vectors in one answer: Ray Serve refuses a message of more than 4 MiB."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SplitConfig:
    """How many replicas each part of the split topology has, and what each of them takes."""

    retrievers: int = 1
    """replicas of the retriever and its index"""
    rankers: int = 1
    """replicas of the ranker"""
    texts: int = 1
    """replicas of text search"""

    def __post_init__(self) -> None:
        for name in ("retrievers", "rankers", "texts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"[split] {name} is {getattr(self, name)}; expected at least 1")

    def replicas(self, part: Part) -> int:
        """Return how many replicas a part has."""
        return {"retriever": self.retrievers, "ranker": self.rankers, "text": self.texts}[part]


@dataclass(frozen=True)
class Refusal:
    """A `RequestError` as a value: what a part refuses travels as an answer, not as a failure of the part."""

    status: int
    code: str
    message: str


class Ask(Protocol):
    """Gets words to some replica of a part and its answer back."""

    def __call__(self, part: Part, stage: str, place: BundlePlace, *arguments: Any) -> Any:
        """Return the answer; raises `PartError` if there is none, `RequestError` if the part refuses."""
        ...


# --- in a replica of a part


class PartHost:
    """The bundles of one part, by version. Safe to call from several threads.

    Args:
        part: which of their models are kept.
        device: where they run; `auto` is the GPU where this process sees one.
        search: depths and time budgets of text search.
    """

    def __init__(self, part: Part, device: str, search: SearchConfig) -> None:
        self._part = part
        self._device = pick_device(device)
        self._search = search
        self._held: dict[str, _Held] = {}
        self._now: set[str] = set()
        self._before: set[str] = set()
        self._loading = threading.Lock()

    @property
    def version(self) -> str:
        """One of the bundles that are held, "" before there is one."""
        return next(iter(self._held), "")

    def holds(self, place: BundlePlace) -> bool:
        """Whether a bundle can answer without being loaded first."""
        return place.version in self._held

    def follow(self, plan: Plan) -> None:
        """Hold the bundles of a plan, and those of the plan before, which requests under way still name."""
        versions = set()
        for role, place in plan.places():
            try:
                versions.add(self.hold(place).bundle.version)
            except BundleError as error:
                if role == "champion" and not self._held:
                    raise
                logger.error("%s bundle %s is refused: %s", role, place.directory, error)
        with self._loading:
            if versions != self._now:  # a plan may be sent more than once
                self._before, self._now = self._now, versions
            self._held = {key: held for key, held in self._held.items() if key in self._now | self._before}

    def answer(self, stage: str, place: BundlePlace, arguments: Sequence[Any]) -> Any:
        """Return the answer of a stage by a bundle, loaded now if it is not held, or the `Refusal` of the request."""
        try:
            with torch.inference_mode():
                return STAGES[stage](self.hold(place), *arguments)
        except RequestError as error:
            return Refusal(error.status, error.code, str(error))

    def hold(self, place: BundlePlace) -> "_Held":
        """Return what is kept of a bundle, loaded now if need be; nobody waits for a bundle that is not theirs."""
        held = self._held.get(place.version)
        if held is not None:
            return held
        with self._loading:
            held = self._held.get(place.version)
            if held is None:
                bundle = Bundle.load(place.directory, self._device)
                if place.version and bundle.version != place.version:
                    raise BundleError(f"{place.directory}: holds bundle {bundle.version}, expected {place.version}")
                held = _Held(_only(self._part, bundle), self._search)
                self._held = {**self._held, bundle.version: held}
            return held


class _Held:
    """A bundle without what other parts run, and what searches its text."""

    def __init__(self, bundle: Bundle, search: SearchConfig) -> None:
        self.bundle = bundle
        self.searcher = None
        if bundle.text is not None:
            self.searcher = paced(Searcher(bundle.text, search))

    @cached_property
    def item_vectors(self) -> Tensor:
        """Float32 [V, D] of the retriever, computed at first use."""
        return _retriever(self).item_vectors().float().cpu()


def _only(part: Part, bundle: Bundle) -> Bundle:
    """Return the bundle with the models of one part; the memory of the others is free once the loaded one is gone."""
    keeps: dict[str, tuple[Part, ...]] = {
        "ranking_model": ("ranker",),
        "retriever": ("retriever",),
        "index": ("retriever",),
        "content": (),
        "text": ("text",),
    }
    away: dict[str, Any] = {name: None for name, parts in keeps.items() if part not in parts}
    return replace(bundle, **away)


def _holds(held: _Held) -> str:
    return held.bundle.version


def _pace(held: _Held) -> float:
    return _searcher(held).pace


def _score(held: _Held, history: History, request: Request, candidates: Candidates) -> Tensor:
    device, ranker = held.bundle.device, held.bundle.ranker
    state = ranker.encode(history.to(device))
    return ranker.score(state, request.to(device), candidates.to(device)).float().cpu()


def _user_vectors(held: _Held, history: History) -> Tensor:
    return _retriever(held).user_vectors(history.to(held.bundle.device)).float().cpu()


def _item_vectors(held: _Held, begin: int) -> Tensor:
    """Return the vectors of the rows from one on, as many as fit a message."""
    vectors = held.item_vectors
    return vectors[begin : begin + max(VECTOR_BYTES // (4 * vectors.shape[1]), 1)].clone()


def _nearest(held: _Held, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None) -> Neighbours:
    return _index(held).search(vectors, k, allowed)


def _exact(held: _Held, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None) -> Neighbours:
    return _index(held).exact(vectors, k, allowed)


def _find(
    held: _Held, query: str, spent: Spent, mode: Mode | None, rerank: bool | None, allowed: NDArray[np.bool_] | None
) -> dict[str, Any]:
    found = _searcher(held).search(query, _deadline(spent), mode, rerank, allowed)
    return {name: getattr(found, name) for name in FOUND}


def _rerank(held: _Held, query: str, documents: Sequence[str], tokens: int, spent: Spent) -> Reranked:
    return _searcher(held).rerank(query, documents, tokens, _deadline(spent))


def _deadline(spent: Spent) -> Deadline | None:
    return None if spent is None else Deadline(spent[0], used=spent[1])


FOUND = ("rows", "scores", "first", "reranked", "truncated", "mode", "degraded", "timings", "covered")
"""Of a `Searched`: what travels. The ingress has passages, allowed items and config itself."""

STAGES: Mapping[str, Callable[..., Any]] = {
    "holds": _holds,
    "pace": _pace,
    "score": _score,
    "user_vectors": _user_vectors,
    "item_vectors": _item_vectors,
    "nearest": _nearest,
    "exact": _exact,
    "find": _find,
    "rerank": _rerank,
}


def _retriever(held: _Held) -> Retriever:
    assert held.bundle.retriever is not None, "asked for only where there is one"
    return held.bundle.retriever


def _index(held: _Held) -> Index:
    assert held.bundle.index is not None, "asked for only where there is one"
    return held.bundle.index


def _searcher(held: _Held) -> Searcher:
    assert held.searcher is not None, "asked for only where there is text"
    return held.searcher


# --- in the ingress


@dataclass(frozen=True)
class Elsewhere:
    """Makes a loaded bundle one whose models run in other processes."""

    ask: Ask

    def bundle(self, bundle: Bundle) -> Bundle:
        """Return the bundle with stand-ins for its models, once a replica of each part holds it."""
        place = BundlePlace(bundle.directory, bundle.version)
        for part in PARTS:
            self.ask(part, "holds", place)
        ranker, retriever, index = bundle.ranking_model, bundle.retriever, bundle.index
        away: dict[str, Any] = {}
        if ranker is not None:
            away["ranking_model"] = _Ranker(self.ask, place, bundle.items, ranker.window)
        if retriever is not None:
            away["retriever"] = _Retriever(self.ask, place, bundle.retriever_window, len(bundle.items))
        if index is not None:
            away["index"] = cast(Index, _Index(self.ask, place, len(index)))
        if bundle.text is not None:
            away["text"] = replace(bundle.text, encoder=None, index=None, reranker=None)
        return replace(bundle, device=torch.device("cpu"), **away)

    def searcher(self, bundle: Bundle, config: SearchConfig) -> Searcher:
        """Return what searches the text of such a bundle."""
        assert bundle.text is not None, "asked for only where there is text"
        place = BundlePlace(bundle.directory, bundle.version)
        pace: float = self.ask("text", "pace", place)  # its machine's speed decides
        return _Searcher(self.ask, place, bundle, config, pace)


@dataclass(frozen=True)
class _Ranker:
    """Stands for a ranker: its state is the history itself, which the part encodes and scores in one go."""

    ask: Ask
    place: BundlePlace
    items: ItemTable
    window: int | None

    def encode(self, history: History) -> History:
        return history

    def score(self, state: History, request: Request, candidates: Candidates) -> Tensor:
        scores: Tensor = self.ask("ranker", "score", self.place, state, request, candidates)
        return scores


@dataclass(frozen=True)
class _Retriever:
    """Stands for a retriever."""

    ask: Ask
    place: BundlePlace
    window: int | None
    rows: int

    def user_vectors(self, history: History) -> Tensor:
        vectors: Tensor = self.ask("retriever", "user_vectors", self.place, history)
        return vectors

    def item_vectors(self) -> Tensor:
        parts: list[Tensor] = []
        while (begin := sum(map(len, parts))) < self.rows:
            parts.append(self.ask("retriever", "item_vectors", self.place, begin))
        return torch.cat(parts)


@dataclass(frozen=True)
class _Index:
    """Stands for an index of `size` vectors."""

    ask: Ask
    place: BundlePlace
    size: int

    def __len__(self) -> int:
        return self.size

    def search(self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Neighbours:
        found: Neighbours = self.ask("retriever", "nearest", self.place, vectors, k, allowed)
        return found

    def exact(self, vectors: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None = None) -> Neighbours:
        found: Neighbours = self.ask("retriever", "exact", self.place, vectors, k, allowed)
        return found


class _Searcher(Searcher):
    """Stands for a searcher."""

    def __init__(self, ask: Ask, place: BundlePlace, bundle: Bundle, config: SearchConfig, pace: float) -> None:
        assert bundle.text is not None, "asked for only where there is text"
        super().__init__(bundle.text, config, pace)
        self._ask = ask
        self._place = place

    def search(
        self,
        query: str,
        deadline: Deadline | None = None,
        mode: Mode | None = None,
        rerank: bool | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Searched:
        found = self._ask("text", "find", self._place, query, _spent(deadline), mode, rerank, allowed)
        return Searched(**found, query=query, part=self.part, allowed=allowed, config=self.config)

    def rerank(
        self, query: str, documents: Sequence[str], max_tokens: int, deadline: Deadline | None = None
    ) -> Reranked:
        found: Reranked = self._ask("text", "rerank", self._place, query, documents, max_tokens, _spent(deadline))
        return found


def _spent(deadline: Deadline | None) -> Spent:
    return None if deadline is None else (deadline.seconds, deadline.seconds - deadline.left)
