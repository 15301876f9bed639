"""The HTTP application: the same object under Ray Serve and under plain uvicorn.

Handlers are `async def` and hand the work to three workers (`serving.worker`), a thread each: one ranks, one searches
texts, one reranks what clients send. The event loop stays free for health checks and for reading the next request, and
what waits can be counted, so that overload is answered at once with 503. One thread each, because models need not be
safe in several, and because the work is mostly torch and numpy on cores that replicas use better.
"""

import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import unquote_to_bytes

from fastapi import Depends, FastAPI, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.convertors import Convertor, register_url_convertor

import recsys
from ranking.ladder import Budget, Deadlines
from recsys.errors import RequestError
from recsys.messages import (
    EventsRequest,
    EventsResponse,
    RankRequest,
    RankResponse,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
)
from recsys.search_messages import MAX_BUDGET
from serving import problems
from serving.availability_routes import add_availability
from serving.frame import Frame
from serving.monitor import Monitor
from serving.page import read_page
from serving.pairs import Aside
from serving.replies import (
    ForgottenResponse,
    HistoryResponse,
    ItemsResponse,
    ModelsResponse,
    SimilarResponse,
    UsersResponse,
)
from serving.search_routes import Searches, add_search_routes
from serving.security import ApiKeys, KeyCheck, declare
from serving.service import Service
from serving.telemetry import CONTENT_TYPE
from serving.worker import Worker, json_response


class IdConvertor(Convertor[str]):
    """Any id at all: Starlette's own convertor of paths ends before a last line end, and so names somebody else."""

    regex = r"(?s:.*)"

    def convert(self, value: str) -> str:
        """Return the id."""
        return value

    def to_string(self, value: str) -> str:
        """Return the id."""
        return value


register_url_convertor("id", IdConvertor())

Named = Annotated[str, Path(min_length=1)]
"""A user or an item in a path."""

REPLICA = "x-replica"
"""Header of `/readyz`: tells processes behind one address apart."""

PATIENCE = (0.0, MAX_BUDGET / 1e3, MAX_BUDGET / 1e3)
"""Seconds that work of the ranking, the searching and the reranking worker may take by a request's own wish."""

SHADOW_WAITING = 2
"""Waiting requests above which a shadow does not score: those who wait for an answer come first."""


@dataclass(frozen=True)
class Limits:
    """What one process takes on."""

    waiting: int = 64
    """requests under way or waiting; the next one is answered with 503"""
    body_bytes: int = 8 * 2**20
    """longest request body"""
    stuck_seconds: float = 30.0
    """one piece of work under way for longer makes the process unhealthy: no thread can be stopped from outside"""
    check_seconds: float = 60.0
    """between two golden requests that a process asks itself"""
    deadlines: Deadlines = field(default_factory=Deadlines)
    """of a request and its stages"""


def create_app(
    service: Service, limits: Limits = Limits(), request_ids: bool = True, keys: ApiKeys | None = None
) -> FastAPI:
    """Return the application over a service.

    Args:
        service: what answers.
        limits: waiting requests, bytes.
        request_ids: whether to answer with `x-request-id`; False where the host does.
        keys: that are accepted; None or none leaves the service open.
    """
    ranking, searching, reranking = (Worker(limits.waiting) for _ in range(3))
    monitor = Monitor(service, ranking, limits.check_seconds)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with monitor.watching():
            yield

    app = FastAPI(
        lifespan=lifespan,
        title="recsys",
        version=recsys.__version__,
        description="Recommendations from long behaviour histories. Errors are RFC 9457 problem documents.",
        responses=problems.responses(),
        dependencies=[Depends(_sound_address)],
        redirect_slashes=False,
    )
    problems.install(app)
    searches = Searches(service, searching, reranking)
    app.state.worker = ranking
    # A rerank takes what time the request has given it, and is stuck only after that.
    app.state.busy_seconds = lambda: max(
        worker.busy_seconds - patience
        for worker, patience in zip((ranking, searching, reranking), PATIENCE, strict=True)
    )
    _add_answers(app, service, ranking, searches, monitor, limits.deadlines)
    add_search_routes(app, service, ranking, searches, limits.deadlines)
    _add_lookups(app, service, ranking)
    if service.path.availability is not None:
        add_availability(app, service.path.availability, json_response, service.unknown_items)
    _add_operations(app, service, limits)
    if keys:
        app.add_middleware(KeyCheck, keys=keys)
        declare(app)
    app.add_middleware(Frame, telemetry=service.telemetry, body_bytes=limits.body_bytes, request_ids=request_ids)
    return app


async def _sound_address(request: Request) -> None:
    """Refuse a path that is no UTF-8, which would name somebody else, and what stands behind the `?` and means nothing.

    A body's unknown fields are refused likewise.
    """
    try:
        unquote_to_bytes(request.scope.get("raw_path") or b"").decode()
    except UnicodeDecodeError:
        raise RequestError(422, "validation", "path: its bytes are not UTF-8") from None
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute) or not route.path.startswith("/v1/"):
        return
    known = [parameter.alias for parameter in route.dependant.query_params]
    for name in request.query_params:
        if name not in known:
            there = ", ".join(f"`{one}`" for one in known) or "none"
            raise RequestError(422, "validation", f"query.{name}: no such parameter; there are: {there}")


def _add_answers(
    app: FastAPI, service: Service, worker: Worker, searches: Searches, monitor: Monitor, deadlines: Deadlines
) -> None:
    """The routes that recommend, rank and record."""
    aside = Aside()

    @app.post("/v1/recommend", response_model=RecommendResponse, tags=["recommend"])
    async def recommend(request: RecommendRequest) -> Response:
        """Return the k best items for a user, or for a history sent along."""
        now, budget = service.now, Budget(deadlines)
        found = None if request.query is None else await searches.find(request.query, request.user_id, request.filters)
        answer, waited = await worker.run(lambda: service.recommend(request, now, budget, found), budget)
        if found is None and service.has_rival(request.user_id):
            taken = worker.waiting <= SHADOW_WAITING and aside.offer(lambda: service.compare(request, answer, now))
            service.telemetry.shadow("taken" if taken else "dropped")
        if found is None:  # a blend with a search has scores of its own
            monitor.answered(answer)
        timings = {"queue": waited, **answer.timings, **({} if found is None else found[1].stages)}
        service.telemetry.stages(timings)
        return json_response(answer, timings)

    @app.post("/v1/rank", response_model=RankResponse, tags=["recommend"])
    async def rank(request: RankRequest) -> Response:
        """Return scores in the order of the request, and the ranked list; unknown items are listed apart."""
        budget = Budget(deadlines)
        answer, waited = await worker.run(lambda: service.rank(request, budget), budget)
        timings = {"queue": waited, **answer.timings}
        service.telemetry.stages(timings)
        return json_response(answer, timings)

    @app.post("/v1/events", response_model=EventsResponse, tags=["events"])
    async def events(request: EventsRequest) -> Response:
        """Record events. They are durable before the answer, and used by the very next request.

        A repeat of an `event_id` among the newest events (`/v1/models` says how many) is a `duplicate` if all its
        fields are the same, else a `conflict`; neither changes anything. Late events are put in their place of time. An
        event counts for requests whose moment is later than its own: one dated in the future is not used until then,
        and one dated more than a day ahead is `refused_future`. An item or an action that the bundle does not know is
        kept, and said to be unknown.
        """
        began = time.perf_counter()
        answer, waited = await worker.run(lambda: service.record(request), Budget(deadlines))
        seconds = time.perf_counter() - began
        service.telemetry.effect(seconds)
        timings = {"queue": waited, "record": seconds - waited}
        service.telemetry.stages(timings)
        return json_response(answer, timings)


def _add_lookups(app: FastAPI, service: Service, worker: Worker) -> None:
    """The routes that tell what is known."""

    @app.get("/v1/users", response_model=UsersResponse, tags=["look up"])
    async def users(limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        """Return some user ids to try, those with posted events first."""
        return await _answer(worker, lambda: service.users(limit))

    @app.get("/v1/users/{user_id:id}/history", response_model=HistoryResponse, tags=["look up"])
    async def history(user_id: Named, limit: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Response:
        """Return the newest events of a user, newest first."""
        return await _answer(worker, lambda: service.history(user_id, limit))

    @app.delete("/v1/users/{user_id:id}", response_model=ForgottenResponse, tags=["events"])
    async def forget(user_id: Named) -> Response:
        """Forget a user: no answer uses or shows what was known; events posted later count again.

        A tombstone in the event log says so to every replica, at every later start, and over every later bundle. The
        files of the snapshot and the log keep the older bytes until they are written anew or removed.
        """
        return await _answer(worker, lambda: service.forget(user_id))

    @app.get("/v1/items", response_model=ItemsResponse, tags=["look up"])
    async def items(
        query: Annotated[str, Query(max_length=512, description="part of a name in any case, or an item id")] = "",
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> Response:
        """Return items by a part of their name: the one whose id it is first, then the most frequent in training."""
        return await _answer(worker, lambda: service.items(query, limit))

    @app.get("/v1/items/{item_id:id}/similar", response_model=SimilarResponse, tags=["look up"])
    async def similar(item_id: Named, k: Annotated[int, Query(ge=1, le=1000)] = 10) -> Response:
        """Return the items nearest to an item: by the retriever's vectors, or by name and category without a vector.

        `by` says which. Items that the service's filters deny or that are unavailable now are left out.
        """
        return await _answer(worker, lambda: service.similar(item_id, SimilarRequest(k=k)))

    @app.post("/v1/items/{item_id:id}/similar", response_model=SimilarResponse, tags=["look up"])
    async def similar_filtered(item_id: Named, request: SimilarRequest) -> Response:
        """Return the same of the items that pass the request's filters too."""
        return await _answer(worker, lambda: service.similar(item_id, request))

    @app.get("/v1/models", response_model=ModelsResponse, tags=["look up"])
    async def models() -> Response:
        """Say which bundle is being served."""
        return json_response(service.models(), {})


async def _answer(worker: Worker, work: Callable[[], BaseModel]) -> Response:
    value, waited = await worker.run(work)
    return json_response(value, {"queue": waited})


def _add_operations(app: FastAPI, service: Service, limits: Limits) -> None:
    """The page and the probes."""
    page, replica = read_page(), uuid.uuid4().hex

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def by_hand() -> Response:
        return HTMLResponse(page.html, headers=page.headers)

    @app.get("/livez", response_class=PlainTextResponse, tags=["operate"])
    async def livez() -> str:
        """Say that the process answers; 503 if a piece of work has been stuck in it."""
        busy = app.state.busy_seconds()
        if busy > limits.stuck_seconds:
            raise RequestError(503, "stuck", f"one request has been under way for {busy:.0f} s")
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, tags=["operate"])
    async def readyz(response: Response) -> str:
        """Say which bundle is loaded, its golden requests answered as published; 503 before there is one."""
        response.headers[REPLICA] = replica
        return f"ready {service.served.bundle.version}"

    @app.get("/metrics", response_class=PlainTextResponse, tags=["operate"])
    async def metrics() -> Response:
        """Return the metrics in the Prometheus text format."""
        return Response(service.telemetry.scrape(), media_type=CONTENT_TYPE)
