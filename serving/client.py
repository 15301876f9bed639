"""A typed client of the service: its messages in, its messages out, errors with the service's stable codes.

    from serving.client import Client

    with Client("http://localhost:8000", key="...") as client:
        client.events(EventIn(user_id="ana", item_id="tea", action="buy"))
        for item in client.recommend(user_id="ana", k=5).items:
            print(item.item_id, item.score)

A request is sent again once: at once if the connection breaks, after the time asked for if the answer is 502, 503, 504
or a 500 that is not the service's own: so say Ray Serve's proxies that a replica died. One whose answer is late is not:
the service is still at work on it.
That is safe: answers change nothing, and every event gets an id here, so a repeat of a post is recognised.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
from pydantic import ValidationError

from recsys.errors import RequestError
from recsys.messages import (
    EventIn,
    EventsRequest,
    EventsResponse,
    ItemFilter,
    Message,
    RankRequest,
    RankResponse,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
)
from recsys.search_messages import RerankRequest, RerankResponse, SearchRequest, SearchResponse
from serving.replies import (
    PROBLEM,
    ForgottenResponse,
    HistoryResponse,
    ItemsResponse,
    ModelsResponse,
    SimilarResponse,
    UsersResponse,
)

PASSING = frozenset({502, 503, 504})

LONGEST_WAIT = 5.0  # seconds

RERANK_BUDGET = 30_000
"""Milliseconds that a service takes for a rerank of no budget of its own, unless its settings say otherwise."""

M = TypeVar("M", bound=Message)


class Client:
    """Talks to one service over kept connections; may be used from several threads.

    Args:
        address: e.g. `http://localhost:8000`.
        key: API key, if the service asks for one.
        timeout: seconds for each attempt.
        transport: another way to reach the service, such as an application in the same process.
    """

    def __init__(
        self, address: str, key: str | None = None, timeout: float = 10.0, transport: httpx.BaseTransport | None = None
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def recommend(self, user_id: str | None = None, k: int = 10, **options: Any) -> RecommendResponse:
        """Return the k best items; `options` are the other fields of `RecommendRequest`.

        Raises:
            RequestError: the service refuses, with its status and stable code; here as in every method.
            httpx.TransportError: the service cannot be reached.
        """
        request = RecommendRequest(user_id=user_id, k=k, **options)
        return self._post("/v1/recommend", request, RecommendResponse)

    def rank(self, user_id: str | None, item_ids: list[str], **options: Any) -> RankResponse:
        """Return scores of items in their order, and the ranked list; `options` are other fields of `RankRequest`."""
        return self._post("/v1/rank", RankRequest(user_id=user_id, item_ids=item_ids, **options), RankResponse)

    def search(self, query: str, k: int = 10, **options: Any) -> SearchResponse:
        """Return the k best passages for a text; `options` are the other fields of `SearchRequest`."""
        return self._post("/v1/search", SearchRequest(query=query, k=k, **options), SearchResponse)

    def rerank(self, query: str, documents: Sequence[str], **options: Any) -> RerankResponse:
        """Return documents by their relevance to a text; `options` are the other fields of `RerankRequest`.

        The answer is waited for as long as the request's budget has it, and the client's timeout longer.
        """
        request = RerankRequest(query=query, documents=list(documents), **options)
        seconds = (RERANK_BUDGET if request.budget_ms is None else request.budget_ms) / 1e3
        return self._post("/v1/rerank", request, RerankResponse, seconds)

    def events(self, *events: EventIn) -> EventsResponse:
        """Record events; an event without an id gets one, so that sending it again changes nothing."""
        named = [
            event if event.event_id else event.model_copy(update={"event_id": uuid.uuid4().hex}) for event in events
        ]
        return self._post("/v1/events", EventsRequest(events=named), EventsResponse)

    def history(self, user_id: str, limit: int = 100) -> HistoryResponse:
        """Return the newest events of a user."""
        return self._send("GET", f"/v1/users/{_quoted(user_id)}/history", HistoryResponse, params={"limit": limit})

    def forget(self, user_id: str) -> ForgottenResponse:
        """Forget a user."""
        return self._send("DELETE", f"/v1/users/{_quoted(user_id)}", ForgottenResponse)

    def users(self, limit: int = 20) -> list[str]:
        """Return some user ids."""
        return self._send("GET", "/v1/users", UsersResponse, params={"limit": limit}).users

    def items(self, query: str = "", limit: int = 20) -> ItemsResponse:
        """Return items by a part of their name."""
        return self._send("GET", "/v1/items", ItemsResponse, params={"query": query, "limit": limit})

    def similar(self, item_id: str, k: int = 10, filters: Sequence[ItemFilter] = ()) -> SimilarResponse:
        """Return the items nearest to an item, of those that pass the filters."""
        request = SimilarRequest(k=k, filters=list(filters))
        return self._post(f"/v1/items/{_quoted(item_id)}/similar", request, SimilarResponse)

    def models(self) -> ModelsResponse:
        """Say which bundles are being served, and the state under them."""
        return self._send("GET", "/v1/models", ModelsResponse)

    def _post(self, path: str, request: Message, kind: type[M], seconds: float = 0.0) -> M:
        return self._send("POST", path, kind, request.model_dump_json(exclude_defaults=True), seconds=seconds)

    def _send(
        self,
        method: str,
        path: str,
        kind: type[M],
        body: str | None = None,
        params: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> M:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        patience = seconds + self._timeout
        request = self._http.build_request(method, path, content=body, params=params, headers=headers, timeout=patience)
        try:
            response = self._http.send(request)
        except httpx.ReadTimeout:  # the service is still at work on it
            raise
        except httpx.TransportError:
            response = self._http.send(request)
        if _passing(response):
            time.sleep(_wait(response))
            response = self._http.send(request)
        if response.status_code != httpx.codes.OK:
            raise _refusal(response)
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            detail = f"{method} {path}: the answer is not a {kind.__name__}; do client and service differ in version?"
            raise RequestError(response.status_code, "unexpected_answer", detail) from error


def _passing(response: httpx.Response) -> bool:
    """Say whether the same request may well succeed the next time."""
    own = response.headers.get("content-type", "").startswith(PROBLEM)
    return response.status_code in PASSING or (response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and not own)


def _wait(response: httpx.Response) -> float:
    """Return the seconds to wait before the next try; a second where gateways name a date."""
    asked = response.headers.get("retry-after", "")
    return min(float(asked), LONGEST_WAIT) if asked.isdigit() else 1.0


def _refusal(response: httpx.Response) -> RequestError:
    """Return the error of a problem document, or of whatever stands between client and service."""
    try:
        problem = response.json()
        return RequestError(response.status_code, problem["code"], problem["detail"])
    except (ValueError, KeyError, TypeError):
        return RequestError(response.status_code, "http", f"status {response.status_code}: {response.text[:200]}")


def _quoted(part: str) -> str:
    if part in ("", ".", ".."):  # whatever stands between client and service takes these out of a path
        raise RequestError(422, "validation", f"{part!r} cannot be named in an address")
    return quote(part, safe="")
