"""The routes of text search, and where its work is done.

Encoders take milliseconds to seconds, so they have threads of their own: one for searches, one for lists that clients
want reranked. Neither the event loop nor a request without text ever waits for them; only what a ranker says of a
user is computed on the thread where all rankers work. A budget runs from the request's arrival, waiting included.
"""

from collections.abc import Sequence

from fastapi import FastAPI, Response

from ranking.deadline import Deadline
from ranking.ladder import Budget, Deadlines
from ranking.searched import Searched
from ranking.searcher import Searcher
from recsys.errors import RequestError
from recsys.messages import ItemFilter
from recsys.search_messages import RerankRequest, RerankResponse, SearchRequest, SearchResponse
from serving.lineup import Served
from serving.search_answers import UserOrder, personal_order, rerank_answer, search_answer
from serving.service import Service
from serving.worker import Worker, json_response


class Searches:
    """Runs searches on threads of their own.

    Args:
        service: holds what is served.
        searching: where queries are searched.
        reranking: where documents sent along are reranked.
    """

    def __init__(self, service: Service, searching: Worker, reranking: Worker) -> None:
        self._service = service
        self._searching = searching
        self.reranking = reranking

    def open(self, user_id: str | None, rerank: bool | None = None) -> tuple[Served, Searcher]:
        """Return what answers a user; raises `RequestError` 409 for a bundle that has no text or no reranker for it."""
        served = self._service.lineup.answering(user_id)
        if served.searcher is None:
            version = served.bundle.version
            text = f"bundle {version} searches no text; publish one with `recsys publish --text-encoder`"
            raise RequestError(409, "not_supported", text)
        about = served.bundle.manifest.text
        if rerank and about is not None and about.reranker is None:
            text = f"bundle {served.bundle.version} has no reranker; leave out `rerank`, or publish with `--reranker`"
            raise RequestError(409, "not_supported", text)
        return served, served.searcher

    async def find(
        self, query: str, user_id: str | None, filters: Sequence[ItemFilter] = ()
    ) -> tuple[Served, Searched]:
        """Return what is found for a query, within the configured budget, and by which bundle.

        Raises:
            RequestError: as `open` does; 422 for a filter of a column that the bundle does not have.
        """
        served, searcher = self.open(user_id)
        deadline = searcher.deadline(None)
        searched, waited = await self._searching.run(
            lambda: searcher.search(query, deadline, allowed=served.recommender.allowed(filters))
        )
        return served, searched.after("search_queue", waited)

    async def run(self, served: Served, searcher: Searcher, request: SearchRequest, deadline: Deadline) -> Searched:
        """Search on the thread of searches, for what may be shown."""
        searched, waited = await self._searching.run(
            lambda: searcher.search(
                request.query, deadline, request.mode, request.rerank, served.recommender.allowed(request.filters)
            )
        )
        return searched.after("search_queue", waited)


def add_search_routes(app: FastAPI, service: Service, worker: Worker, searches: Searches, deadlines: Deadlines) -> None:
    """Add the routes that search and rerank.

    Args:
        app: the application.
        service: holds what is served.
        worker: the thread where rankers work.
        searches: the threads where text models work.
        deadlines: of the user's ranker, counted from when the search is done.
    """
    telemetry = service.telemetry

    @app.post("/v1/search", response_model=SearchResponse, tags=["search"])
    async def search(request: SearchRequest) -> Response:
        """Return the k best passages for a text: by words and vectors, the head reranked, blended with a user's ranker.

        Items that the service's filters or the request's deny, or that are unavailable now, are not among the documents
        of a hit, and a passage of such items alone is no hit; what stands below moves up. Documents that are no items
        stay.

        The budget counts from the request's arrival. What does not fit is left out and named in `degraded`: `rerank`
        keeps the order of the first stage, `dense` goes by words alone, `personal` keeps the order of the search.
        `history` says that the user's could not be read.
        """
        served, searcher = searches.open(request.user_id, request.rerank)
        deadline = searcher.deadline(request.budget_ms)
        searched = await searches.run(served, searcher, request, deadline)
        personal = None
        if request.user_id is not None or request.history is not None:
            if deadline.left > 0:
                now, ranked = service.now, Budget(deadlines)

                def personally() -> tuple[UserOrder, bool]:
                    with service.reading() as read:
                        order = personal_order(served, searched, request, now, ranked)
                    return order, read.missed

                (personal, missed), waited = await worker.run(personally)
                searched = searched.after("queue", waited)
                for stage in dict.fromkeys((*personal.left_out, *(("history",) if missed else ()))):
                    searched = searched.without(stage)
            else:
                searched = searched.without("personal")
        answer = search_answer(served, searched, request, personal)
        telemetry.answer(answer.user_known is not False, answer.degraded)
        telemetry.stages(answer.timings)
        return json_response(answer, answer.timings)

    async def rerank(request: RerankRequest) -> Response:
        """Order documents by their relevance to a query: the request and answer of Cohere's `POST /v2/rerank`.

        A document is a string, or an object with `text` or `title` whose other fields are not read. Version 1's
        `return_documents` is taken too.
        The bundle's reranker scores them; where there is none, the encoder's cosine. Documents that were not scored
        when the budget ended stand below, in the order of the request, with a score of 0, and `meta.degraded` says
        `rerank`; of a reranker that reads the list as a whole they are all of them.
        """
        served, searcher = searches.open(None)
        budget = searcher.config.rerank_budget_ms if request.budget_ms is None else request.budget_ms
        deadline = searcher.deadline(budget)
        answer, waited = await searches.reranking.run(lambda: rerank_answer(served.bundle, searcher, request, deadline))
        telemetry.answer(True, answer.meta.degraded)
        timings = {"queue": waited, **answer.meta.timings}
        telemetry.stages(timings)
        return json_response(answer, timings)

    app.post("/v1/rerank", response_model=RerankResponse, tags=["search"])(rerank)
    # The path that Cohere's own clients ask under a base URL.
    app.post("/v2/rerank", response_model=RerankResponse, include_in_schema=False)(rerank)
