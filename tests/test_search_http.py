"""Search and rerank over HTTP: shapes, time budgets, what does not wait for what, and every refusal."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving_world import PATIENT_SEARCH, WAIT, patient_app
from starlette.testclient import TestClient
from text_world import (
    NAMES,
    WordCount,
    catalogue,
    publish_corpus,
    publish_search,
    snapshot,
    tiny_encoder,
)

from ranking.bundle import Bundle, write_bundle
from ranking.searcher import Searcher
from recsys.errors import StoreError
from recsys.messages import MAX_QUERY
from recsys.progress import silent
from recsys.search_messages import MAX_DOCUMENTS
from serving.client import Client
from serving.monitor import Monitor
from serving.settings import ServeConfig, load_into, open_service
from worlds import PROVENANCE

LATER = 2**60


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    place = tmp_path_factory.mktemp("bundles")
    return {
        "search": publish_search(place / "search", reranker=WordCount()),
        "words": publish_search(place / "words", encoder=False),
        "corpus": publish_corpus(place / "corpus", ["red tea", "green bread", "red tea"], encoder=tiny_encoder()),
        "none": publish_nothing(place / "none"),
        "snapshot": snapshot(place / "snapshot"),
    }


def publish_nothing(directory):
    write_bundle(directory, catalogue()[1], PROVENANCE)
    return directory


@pytest.fixture(scope="module")
def opened(bundles, tmp_path_factory):
    """Services by bundle, opened once."""
    services = {}
    for name in ("search", "words", "corpus", "none"):
        state = tmp_path_factory.mktemp("state")
        config = ServeConfig(bundles[name], bundles["snapshot"], state, durability="os", search=PATIENT_SEARCH)
        services[name] = open_service(config)
        load_into(services[name], bundles[name])
    yield services
    for service in services.values():
        service.close()


def client_of(service) -> TestClient:
    return TestClient(patient_app(service, body_bytes=2_000_000), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(opened):
    with client_of(opened["search"]) as client:
        yield client


def search(client, **fields) -> dict:
    response = client.post("/v1/search", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def rerank(client, path="/v1/rerank", **fields) -> dict:
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def with_reranker(service, reranker):
    """Put a reranker in the place of the service's, whatever the bundle says."""
    served = service.served
    part = dataclasses.replace(served.searcher.part, reranker=reranker)
    searcher = type(served.searcher)(part, served.searcher.config)
    service.swap(dataclasses.replace(served, searcher=searcher))
    return served


# --- answers


def test_documents_without_text_are_relevant_to_nothing(client):
    found = rerank(client, query="red tea", documents=["", "green bread", " \n", "red tea", {"title": "", "text": ""}])
    assert [one["index"] for one in found["results"]][-3:] == [0, 2, 4]
    assert [one["relevance_score"] == 0.0 for one in found["results"]] == [False, False, True, True, True]
    assert found["results"][0]["index"] == 3


def test_a_search_says_where_each_hit_stood(client):
    plain = search(client, query="red tea", rerank=False, k=30)
    assert (plain["mode"], plain["user_known"], plain["degraded"]) == ("hybrid", None, [])
    assert [hit["first_stage_rank"] for hit in plain["hits"]] == list(range(1, 31))
    assert {hit["rerank_rank"] for hit in plain["hits"]} == {None}
    found = search(client, query="red tea", rerank=True, k=30)
    assert [hit["rerank_rank"] for hit in found["hits"]] == list(range(1, 31))
    assert [hit["placed_by"] for hit in found["hits"]] == ["rerank"] * 20 + ["hybrid"] * 10
    first = {hit["text"]: hit["first_stage_rank"] for hit in plain["hits"]}
    assert {hit["text"]: hit["first_stage_rank"] for hit in found["hits"]} == first
    best = found["hits"][0]
    assert (best["text"], best["documents"], len(best["also"]), best["truncated"]) == ("red tea", 3, 2, False)
    assert {best["document_id"], *best["also"]} == {"item-0", "item-30", "item-60"}


def test_an_answer_says_that_the_words_spared_the_reranker(client):
    plain, found = search(client, query="red tea", rerank=False), search(client, query="red tea")
    assert (plain["covered"], found["covered"], found["degraded"]) == (False, True, [])
    assert found["hits"] == plain["hits"]
    assert "rerank" not in found["timings"]
    other = search(client, query="red tea and soap")
    assert (other["covered"], {hit["placed_by"] for hit in other["hits"]}) == (False, {"rerank"})


def test_a_search_says_that_a_history_could_not_be_read_and_the_next_answer_does_not(opened, client, monkeypatch):
    def gone(*_):
        raise StoreError("gone")

    with monkeypatch.context() as away:
        away.setattr(opened["search"].store, "observe", gone)
        found = search(client, query="red tea", user_id="user-3", at=LATER)
        refused = {"user_id": "user-3", "filters": [{"column": "?", "deny": ["a"]}]}
        assert client.post("/v1/recommend", json=refused).status_code == 422
    assert (found["user_known"], found["degraded"]) == (False, ["history"])
    inline = {"history": [{"item_id": "item-1", "timestamp": 1}]}
    assert search(client, query="red tea", **inline)["degraded"] == []
    assert client.post("/v1/recommend", json=inline).json()["degraded"] == []
    assert client.post("/v1/rank", json=inline | {"item_ids": ["item-2"]}).json()["degraded"] == []


def test_a_ranker_that_fails_leaves_the_order_of_the_search(opened, client, monkeypatch):
    plain = search(client, query="red tea", k=30)
    served = opened["search"].lineup.answering("user-3")

    def fail(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(served.bundle.ranker, "score", fail)
        found = search(client, query="red tea", user_id="user-3", at=LATER, k=30)
    assert (found["user_known"], found["degraded"]) == (True, ["personal"])
    assert found["hits"] == plain["hits"]
    assert search(client, query="red tea", user_id="user-3", at=LATER)["degraded"] == []


def test_the_scores_of_a_blend_with_a_search_are_no_drift_of_the_rankers(client, monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(Monitor, "answered", lambda _, answer: taken.append(len(answer.items)))
    for body in ({"k": 3}, {"k": 4, "query": "red tea"}):
        client.post("/v1/recommend", json={"user_id": "user-3", "at": LATER} | body).raise_for_status()
    assert taken == [3]


def test_for_a_user_the_order_follows_the_ranker_too(client):
    found = search(client, query="wombat tea zebra", rerank=True, user_id="user-3", at=LATER, k=30)
    assert found["user_known"]
    head = sorted(hit["personal_rank"] for hit in found["hits"][:20])
    assert [hit["rerank_rank"] for hit in found["hits"][20:]] == list(range(21, 31))
    score = [1 / (60 + hit["rerank_rank"]) for hit in found["hits"]]
    for place, hit in enumerate(found["hits"][:20]):
        score[place] += 1 / (61 + head.index(hit["personal_rank"]))
    assert [hit["score"] for hit in found["hits"]] == pytest.approx(score)
    assert score == sorted(score, reverse=True)
    assert sorted(hit["personal_rank"] for hit in found["hits"]) == list(range(1, 31))
    best = min(found["hits"], key=lambda hit: hit["personal_rank"])
    ids = [f"item-{number}" for number in range(62) if NAMES[number % 30] == best["text"]]
    ranked = client.post("/v1/rank", json={"user_id": "user-3", "item_ids": ids, "at": LATER}).json()
    assert best["document_id"] == ranked["ranked"][0]
    stranger = search(client, query="red tea", user_id="nobody at all", k=30)
    assert stranger["user_known"] is False
    assert [hit["text"] for hit in stranger["hits"]] == [
        hit["text"] for hit in search(client, query="red tea", k=30)["hits"]
    ]
    history = client.get("/v1/users/user-3/history?limit=10000").json()["events"]
    inline = [{"item_id": event["item_id"], "timestamp": event["timestamp"]} for event in history[::-1]]
    sent = search(client, query="wombat tea zebra", rerank=True, history=inline, at=LATER, k=30)
    assert sent["hits"] == found["hits"]


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
@pytest.mark.parametrize("rerank", [True, False, None])
def test_the_service_answers_what_a_searcher_finds_offline(client, bundles, mode, rerank):
    part = Bundle.load(bundles["search"]).text
    for query in ("red tea", "black jam and white soap", "unheard of"):
        found = Searcher(part).search(query, mode=mode, rerank=rerank)
        fields = {"mode": mode, "rerank": rerank, "k": 100, "budget_ms": 60_000}
        answer = search(client, query=query, **fields)
        hits = answer["hits"]
        assert answer["covered"] == found.covered
        assert [hit["text"] for hit in hits] == [part.passages.text(row) for row in found.rows.tolist()]
        assert [hit["score"] for hit in hits] == found.scores.tolist()
        assert [hit["first_stage_rank"] for hit in hits] == found.first.tolist()


def test_recommendations_with_a_query_are_of_what_is_found(client):
    body = {"user_id": "user-3", "query": "red tea", "k": 5, "at": LATER}
    answer = client.post("/v1/recommend", json=body).json()
    assert all(item["sources"] == ["search"] for item in answer["items"])
    without = client.post("/v1/recommend", json={**body, "query": None}).json()
    assert [item["item_id"] for item in answer["items"]] != [item["item_id"] for item in without["items"]]


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
def test_rerank_has_the_shape_of_cohere(client, path):
    documents = ["green bread", {"text": "tea", "title": "red"}, "red soap " + "and jam " * 10, ""]
    answer = rerank(client, path, model="rerank-v3.5", query="red tea", documents=documents, top_n=3)
    assert set(answer) == {"id", "results", "meta"}
    assert [result["index"] for result in answer["results"]] == [1, 2, 0]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    meta = answer["meta"]
    assert meta["api_version"]["version"] == "2"
    assert (meta["truncated"], meta["degraded"], meta["model"]) == ([2], [], "word_count")
    assert "1 documents" in meta["warnings"][0]
    every = rerank(client, query="red tea", documents=documents, top_n=999)
    assert [result["index"] for result in every["results"]] == [1, 2, 0, 3]
    cut = rerank(client, query="red tea", documents=["red tea", "bread and jam with red tea"], max_tokens_per_doc=2)
    assert [result["index"] for result in cut["results"]] == [0, 1]
    assert cut["meta"]["truncated"] == [1]


def test_a_search_among_some_of_the_items(client, opened):
    denied = [{"column": "item_id", "deny": ["item-0", "item-30", "item-60", "item-1"]}]
    every = search(client, query="red tea", k=30, rerank=False)
    found = search(client, query="red tea", k=30, rerank=False, filters=denied)
    left = {hit["text"] for hit in every["hits"] if hit["text"] != "red tea"}  # whose three items are denied
    assert {hit["text"] for hit in found["hits"]} == left
    assert not {"item-0", "item-1"} & {one for hit in found["hits"] for one in (hit["document_id"], *hit["also"])}
    assert "warnings" not in found
    named = [{"column": "item_id", "allow": ["item-30", "item-7", "nothing"]}]
    for fields in ({}, {"user_id": "user-3", "at": LATER}):
        some = search(client, query="red tea", filters=named, **fields)
        assert {(hit["document_id"], hit["documents"]) for hit in some["hits"]} == {("item-30", 1), ("item-7", 1)}
        assert some["warnings"] == ["filters[0] of item_id allows what no item has: 'nothing'"]
    recommended = client.post("/v1/recommend", json={"user_id": "user-3", "query": "red tea", "filters": named})
    assert {item["item_id"] for item in recommended.json()["items"]} == {"item-30", "item-7"}
    unknown = {"query": "tea", "filters": [{"column": "colour", "deny": ["red"]}]}
    refused = client.post("/v1/search", json=unknown)
    assert (refused.status_code, "'colour'" in refused.json()["detail"]) == (422, True)
    with client_of(opened["corpus"]) as corpus:
        refused = corpus.post("/v1/search", json=unknown)
        assert (refused.status_code, refused.json()["code"]) == (409, "not_supported")
        assert "no columns to filter by; leave out `filters`" in refused.json()["detail"]


def test_the_client_searches_and_reranks(client):
    def answer(request):
        got = client.request(request.method, request.url.path, content=request.read(), headers=dict(request.headers))
        return httpx.Response(got.status_code, content=got.content)

    with Client("http://testserver", transport=httpx.MockTransport(answer)) as ours:
        found = ours.search("red tea", k=3, rerank=False)
        assert [hit.text for hit in found.hits] == [
            hit["text"] for hit in search(client, query="red tea", k=3, rerank=False)["hits"]
        ]
        assert ours.rerank("red tea", ["green bread", "red tea"], top_n=1).results[0].index == 1


def test_documents_are_taken_as_clients_send_them(client):
    documents = ["green bread", {"id": "1", "text": "tea", "title": "red", "tags": [1]}, {"title": "red soap"}]
    plain = rerank(client, query="red tea", documents=documents)
    assert {*plain["results"][0]} == {"index", "relevance_score"}
    found = rerank(client, query="red tea", documents=documents, return_documents=True)
    assert [result.pop("document") for result in found["results"]] == [
        {"text": "red tea"},
        {"text": "red soap"},
        {"text": "green bread"},
    ]
    assert found["results"] == plain["results"]


def test_a_bundle_of_text_alone_searches_and_says_what_it_cannot(opened):
    with client_of(opened["corpus"]) as client:
        assert search(client, query="bread")["hits"][0]["document_id"] == "d1"
        assert search(client, query="tea", mode="bm25")["hits"][0]["also"] == ["d2"]
        answer = rerank(client, query="red tea", documents=["green bread", "red tea"])
        assert [result["index"] for result in answer["results"]] == [1, 0]
        assert answer["meta"]["model"] == "dense"
        for path, body in (("recommend", {"user_id": "u"}), ("rank", {"user_id": "u", "item_ids": ["d1"]})):
            refused = client.post(f"/v1/{path}", json=body)
            assert (refused.status_code, refused.json()["code"]) == (409, "not_supported")
            assert "--ranker" in refused.json()["detail"]
        assert client.get("/v1/models").json()["models"] == [{"role": "text encoder", "name": "dense"}]
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/items").json()["items"] == []


# --- time


def test_past_its_budget_a_search_keeps_the_first_stage_and_says_so(client, opened):
    slow = WordCount(seconds=0.1)
    before = with_reranker(opened["search"], slow)
    try:
        plain = search(client, query="red tea", rerank=False)
        found = search(client, query="red tea", rerank=True, budget_ms=1_500)
        assert found["degraded"] == ["rerank"]
        assert [hit["text"] for hit in found["hits"]] == [hit["text"] for hit in plain["hits"]]
        assert slow.scored < 20, "the work went on behind the answer"
        scored = slow.scored
        documents = [f"{name} {number}" for name in ("red tea", "green bread", "jam") for number in range(20)]
        kept = rerank(client, query="jam", documents=documents, budget_ms=1_500, top_n=3)
        assert slow.scored - scored < 60
        assert kept["meta"]["degraded"] == ["rerank"]
        assert kept["results"] == [{"index": index, "relevance_score": 0.0} for index in range(3)]
        assert "time was up" in kept["meta"]["warnings"][0]
        assert (kept["meta"]["model"], kept["meta"]["truncated"]) == ("first_stage", [])
    finally:
        opened["search"].swap(before)
    nothing = search(client, query="red tea", rerank=True, budget_ms=0, user_id="user-3")
    assert (nothing["mode"], nothing["degraded"]) == ("bm25", ["dense", "rerank", "personal"])
    assert 'recsys_degraded_total{stage="rerank"}' in client.get("/metrics").text


def test_what_was_scored_in_time_keeps_its_score_where_documents_are_read_one_by_one(client, opened):
    slow = WordCount(seconds=0.01, whole_list=False)
    before = with_reranker(opened["search"], slow)
    try:
        documents = [f"jam {number}" if number % 10 == 5 else f"tea {number}" for number in range(999)]
        kept = rerank(client, query="jam", documents=[*documents, ""], budget_ms=2_000)
    finally:
        opened["search"].swap(before)
    order = [result["index"] for result in kept["results"]]
    scored = [result["index"] for result in kept["results"] if result["relevance_score"] > 0]
    assert len(scored) % 64 == 0
    assert 0 < len(scored) <= slow.scored < 1000
    assert order[: len(scored)] == sorted(range(len(scored)), key=lambda n: (n % 10 != 5, n))
    assert order[len(scored) :] == list(range(len(scored), 1000))
    assert kept["meta"]["degraded"] == ["rerank"]
    assert f"{len(scored)} of 1000 documents" in kept["meta"]["warnings"][0]
    assert kept["meta"]["model"] == "word_count"


class Held(WordCount):
    """A reranker that waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()

    def rerank(self, query, passages, progress=silent):
        self.entered.release()
        assert self.go.wait(WAIT)
        return super().rerank(query, passages, progress)


def test_no_request_without_text_waits_for_a_text_model(opened):
    held = Held()
    before = with_reranker(opened["search"], held)
    try:
        with client_of(opened["search"]) as client, ThreadPoolExecutor(2) as clients:
            searching = clients.submit(search, client, query="red tea", rerank=True, budget_ms=60_000)
            assert held.entered.acquire(timeout=WAIT)
            reranking = clients.submit(rerank, client, query="red", documents=["red tea"])
            assert held.entered.acquire(timeout=WAIT)
            assert client.get("/livez").status_code == 200
            assert client.post("/v1/recommend", json={"user_id": "user-1"}).status_code == 200
            assert not searching.done()
            assert not reranking.done()
            held.go.set()
            assert searching.result()["hits"]
            assert reranking.result()["results"]
    finally:
        held.go.set()
        opened["search"].swap(before)


# --- refusals

WRONG = {
    "a query of 100,000 characters": ("search", {"query": "a" * 100_000}, 422, "validation", str(MAX_QUERY)),
    "items for no words": ("recommend", {"user_id": "user-1", "query": ""}, 422, "validation", "query"),
    "items for a blank query": ("recommend", {"user_id": "user-1", "query": " "}, 422, "validation", "query"),
    "a blank query": ("search", {"query": " \n"}, 422, "validation", "query"),
    "no query": ("search", {}, 422, "validation", "query"),
    "a query that is a list": ("search", {"query": ["tea"]}, 422, "validation", "query"),
    "k above the bound": ("search", {"query": "tea", "k": 101}, 422, "validation", "k: "),
    "an unknown mode": ("search", {"query": "tea", "mode": "magic"}, 422, "validation", "mode"),
    "a negative budget": ("search", {"query": "tea", "budget_ms": -1}, 422, "validation", "budget_ms"),
    "a moment out of range": ("search", {"query": "tea", "user_id": "u", "at": 2**70}, 422, None, "at"),
    "zero documents": ("rerank", {"query": "tea", "documents": []}, 422, "validation", "documents"),
    "no documents": ("rerank", {"query": "tea"}, 422, "validation", "documents"),
    "mixed types": ("rerank", {"query": "tea", "documents": ["a", 3]}, 422, "validation", "documents.1"),
    "a number among documents": (
        "rerank",
        {"query": "t", "documents": ["a", 3]},
        422,
        "validation",
        "documents.1: expected a string, or an object with `text` or `title`",
    ),
    "an object without text and title": (
        "rerank",
        {"query": "t", "documents": ["a", {"id": "1"}]},
        422,
        "validation",
        "documents.1.object: Value error, expected `text` or `title`",
    ),
    "an object whose text is none": (
        "rerank",
        {"query": "t", "documents": [{"text": 3}]},
        422,
        "validation",
        "documents.0.object.text: Input should be a valid string",
    ),
    "half of a surrogate pair": (
        "rerank",
        {"query": "t", "documents": ["a", "red \ud83d tea"]},
        422,
        "validation",
        "documents.1.string",
    ),
    "half of a surrogate pair in an object": (
        "rerank",
        {"query": "t", "documents": [{"text": "a", "title": "red \ud83d tea"}]},
        422,
        "validation",
        "documents.0.object.title",
    ),
    "one text in place of a list": ("rerank", {"query": "tea", "documents": "tea"}, 422, "validation", "documents"),
    "top_n of nothing": ("rerank", {"query": "tea", "documents": ["a"], "top_n": 0}, 422, "validation", "top_n"),
    "no tokens": (
        "rerank",
        {"query": "t", "documents": ["a"], "max_tokens_per_doc": 0},
        422,
        "validation",
        "max_tokens",
    ),
    "too many documents": (
        "rerank",
        {"query": "t", "documents": ["a"] * (MAX_DOCUMENTS + 1)},
        413,
        "too_many_documents",
        "1000",
    ),
    "a long query to rerank": ("rerank", {"query": "a" * 100_000, "documents": ["a"]}, 422, "validation", "query"),
    "a long query to recommend": ("recommend", {"user_id": "u", "query": "a" * 100_000}, 422, "validation", "query"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_in_words(client, case):
    route, body, status, code, told = WRONG[case]
    headers = {"Content-Type": "application/json"}
    response = client.post(f"/v1/{route}", content=json.dumps(body), headers=headers)  # surrogates as \\ud83d
    found = response.json()
    assert response.status_code == status, found
    assert response.headers["content-type"] == "application/problem+json"
    assert code is None or found["code"] == code
    assert told in found["detail"]


def test_odd_but_legal_input_is_answered(client):
    assert search(client, query="unheard-of words ☕ \u0000")["hits"]
    assert search(client, query="the of and", mode="bm25")["hits"] == []
    assert len(rerank(client, query="x", documents=[""])["results"]) == 1
    long = rerank(client, query="red", documents=["red " * 200_000, "red"])
    assert long["meta"]["truncated"] == [0]


def test_a_bundle_without_text_says_how_to_get_it(opened):
    with client_of(opened["none"]) as client:
        for path, body in (
            ("search", {"query": "tea"}),
            ("rerank", {"query": "tea", "documents": ["tea"]}),
            ("recommend", {"user_id": "user-1", "query": "tea"}),
        ):
            refused = client.post(f"/v1/{path}", json=body)
            assert (refused.status_code, refused.json()["code"]) == (409, "not_supported")
            assert "--text-encoder" in refused.json()["detail"]
    with client_of(opened["words"]) as client:
        refused = client.post("/v1/rerank", json={"query": "tea", "documents": ["tea"]})
        assert (refused.status_code, "--reranker" in refused.json()["detail"]) == (409, True)
        assert client.post("/v1/search", json={"query": "tea", "mode": "dense"}).status_code == 409
        refused = client.post("/v1/search", json={"query": "tea", "rerank": True})
        assert (refused.status_code, "--reranker" in refused.json()["detail"]) == (409, True)
        assert client.post("/v1/search", json={"query": "tea", "rerank": False}).status_code == 200
        assert search(client, query="red tea")["mode"] == "bm25"


def test_the_schema_has_the_routes_whole(client):
    schema = client.get("/openapi.json").json()
    for path in ("/v1/search", "/v1/rerank"):
        answers = schema["paths"][path]["post"]["responses"]
        assert {"200", "4XX", "503"} <= set(answers)
        assert schema["paths"][path]["post"]["description"]
    for name in ("SearchRequest", "SearchHit", "SearchResponse", "RerankRequest", "RerankResponse"):
        assert schema["components"]["schemas"][name]["description"]
