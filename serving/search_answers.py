"""What text search answers, free of HTTP."""

import time
import uuid
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ranking.bundle import Bundle
from ranking.deadline import Deadline
from ranking.ladder import Budget
from ranking.searched import Personal, Searched
from ranking.searcher import Searcher
from recsys.errors import RequestError
from recsys.messages import RankRequest
from recsys.search_messages import (
    MAX_DOCUMENTS,
    RerankedText,
    RerankMeta,
    RerankRequest,
    RerankResponse,
    RerankResult,
    SearchHit,
    SearchRequest,
    SearchResponse,
)
from serving.lineup import Served

ALSO = 5
"""Most further documents of a hit that are named."""
TOLD = {"history": "history", "rank": "personal"}
"""Stages of a ranker's answer that a search's answer names, and what it calls them."""


@dataclass(frozen=True)
class UserOrder:
    """What a user's ranker says of a search.

    Attributes:
        known: whether it knows the user.
        order: the blended order, if it does and has said something.
        left_out: stages that failed or were late: `history` of the user, `personal` for the ranker.
        seconds: what it took.
    """

    known: bool
    order: Personal | None
    left_out: tuple[str, ...]
    seconds: float


def personal_order(
    served: Served, searched: Searched, request: SearchRequest, now: int, budget: Budget | None = None
) -> UserOrder:
    """Rank the items of what was found for a user or an inline history.

    Args:
        served: the bundle that searched.
        searched: what was found.
        request: names the user.
        now: the moment, microseconds UTC, where the request names none.
        budget: with one, a ranker that fails or is late leaves the order of the search.

    Raises:
        RequestError: 409 for a bundle without a ranker, 422 for a moment out of range.
    """
    began = time.perf_counter()
    rows, places = searched.items()
    ids = [served.bundle.item_ids[row] for row in rows.tolist()]
    ask = RankRequest(user_id=request.user_id, history=request.history, item_ids=ids or [""], at=request.at)
    ranked = served.recommender.rank(ask, now, budget)
    left_out = tuple(TOLD[stage] for stage in ranked.degraded if stage in TOLD)
    if "personal" in left_out or not ranked.user_known or not ids:
        return UserOrder(ranked.user_known, None, left_out, time.perf_counter() - began)
    order = {item: -place for place, item in enumerate(ranked.ranked)}
    # Probabilities may be equal where the scores they were made of were not.
    known = [order.get(item) for item in ids] if ranked.calibrated else ranked.scores
    scores = np.array([-np.inf if score is None else score for score in known], np.float32)
    return UserOrder(True, searched.for_user(places, rows, scores), left_out, time.perf_counter() - began)


def search_answer(served: Served, searched: Searched, request: SearchRequest, user: UserOrder | None) -> SearchResponse:
    """Return the k best passages in the order of the search, or in that for a user."""
    bundle = served.bundle
    personal = None if user is None else user.order
    places = np.arange(len(searched)) if personal is None else personal.order
    hits = [_hit(bundle, searched, place, personal) for place in places[: request.k].tolist()]
    return SearchResponse(
        hits=hits,
        mode=searched.mode,
        user_known=None if user is None else user.known,
        model_version=bundle.version,
        covered=searched.covered,
        degraded=list(searched.degraded),
        timings=searched.timings if user is None else searched.after("personal", user.seconds).timings,
        warnings=served.recommender.warnings(request.filters),
    )


def _hit(bundle: Bundle, searched: Searched, place: int, personal: Personal | None) -> SearchHit:
    passages, row = searched.part.passages, int(searched.rows[place])
    documents = passages.documents(row, ALSO + 1, searched.allowed)
    item = -1 if personal is None else int(personal.item[place])
    first = documents[0] if item < 0 else bundle.item_ids[item]
    if personal is not None:
        score, placed_by = float(personal.scores[place]), "personal"
    else:
        score = float(searched.scores[place])
        placed_by = "rerank" if place < searched.reranked else searched.mode
    return SearchHit(
        document_id=first,
        text=passages.text(row),
        score=score,
        placed_by=placed_by,
        first_stage_rank=int(searched.first[place]),
        rerank_rank=place + 1 if searched.reranked else None,
        personal_rank=int(personal.rank[place]) or None if personal is not None else None,
        documents=passages.count(row, searched.allowed),
        also=[other for other in documents if other != first][:ALSO],
        truncated=bool(searched.truncated[place]),
    )


def rerank_answer(bundle: Bundle, searcher: Searcher, request: RerankRequest, deadline: Deadline) -> RerankResponse:
    """Order documents that were sent along.

    Raises:
        RequestError: 413 for more than `MAX_DOCUMENTS`, 409 for a bundle without a text model.
    """
    if len(request.documents) > MAX_DOCUMENTS:
        text = f"{len(request.documents)} documents; at most {MAX_DOCUMENTS} are reranked at once"
        raise RequestError(413, "too_many_documents", text)
    began = time.perf_counter()
    texts = [each if isinstance(each, str) else each.words for each in request.documents]
    found = searcher.rerank(request.query, texts, request.max_tokens_per_doc, deadline)
    truncated = np.flatnonzero(found.truncated).tolist()
    warnings = []
    scores = np.full(len(texts), -np.inf, np.float32) if found.scores is None else found.scores
    scored = np.isfinite(scores)
    if not scored.all():
        warnings.append(
            f"the time was up when {scored.sum()} of {len(texts)} documents were scored: the others stand below, in "
            "the order of the request"
        )
    said = scored & [bool(text.strip()) for text in texts]
    relevance = np.where(said, _relevance(scores), 0.0)  # of nothing, none
    order = np.lexsort((np.arange(len(texts)), -scores, ~said, ~scored))
    if truncated:
        warnings.append(f"only the beginning of {len(truncated)} documents was read: see meta.truncated")
    return RerankResponse(
        id=str(uuid.uuid4()),
        results=[
            RerankResult(
                index=index,
                relevance_score=float(relevance[index]),
                document=RerankedText(text=texts[index]) if request.return_documents else None,
            )
            for index in order[: request.top_n].tolist()
        ],
        meta=RerankMeta(
            warnings=warnings,
            model=searcher.part.reranker_kind if scored.any() else "first_stage",
            model_version=bundle.version,
            degraded=[] if scored.all() else ["rerank"],
            truncated=truncated,
            timings={"rerank": time.perf_counter() - began},
        ),
    )


def _relevance(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Bring scores of any size to 0..1 in the same order: 1 / (1 + e^-s)."""
    return 1.0 / (1.0 + np.exp(-np.clip(scores.astype(np.float64), -30.0, 30.0)))
