"""Parts that fail or lag under a service with users waiting: what is answered then, and what it is called."""

import contextlib
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_world import LATER, PATIENT, WAIT, Place, eventually, free_port, patient_app
from starlette.testclient import TestClient

from ranking.ladder import Budget, Deadlines, Ladder, retriever_order
from ranking.recommender import Recommender
from ranking.sources import Proposal, merge
from recsys.errors import RequestError, StoreError
from recsys.messages import EventIn, EventsRequest, InlineEvent, RankRequest, RecommendRequest
from serving.app import Limits, Worker, create_app
from serving.lineup import Served

STAGES = ("history", "retrieval", "rank", "search")
HISTORY = [InlineEvent(item_id=f"item-{number}", timestamp=LATER - 1000 + number) for number in range(8)]


class Faulty:
    """Anything, with one method that raises."""

    def __init__(self, inner, method: str) -> None:
        self._inner, self._method = inner, method

    def __getattr__(self, name: str):
        if name == self._method:
            raise ZeroDivisionError("injected")
        return getattr(self._inner, name)

    def __len__(self) -> int:
        return len(self._inner)


@pytest.fixture
def bundle(service):
    return service.served.bundle


def ask(recommender, budget: Budget | None, **fields):
    return recommender.recommend(RecommendRequest(**{"user_id": "user-1", "k": 8, "at": LATER} | fields), LATER, budget)


def budget(**late: float) -> Budget:
    return Budget(dataclasses.replace(PATIENT, **late))


# --- the ladder


def test_a_budget_with_time_left_changes_no_answer(service):
    recommender = service.served.recommender
    assert ask(recommender, budget()).items == ask(recommender, None).items
    assert ask(recommender, budget()).degraded == []


def test_without_its_ranker_it_answers_in_the_retrievers_order(service, bundle):
    for method in ("encode", "score"):
        broken = Recommender(dataclasses.replace(bundle, ranking_model=Faulty(bundle.ranker, method)), service.store)
        answer = ask(broken, budget())
        assert answer.degraded == ["rank"]
        explained = ask(service.served.recommender, None, explain=True, k=62)
        place = {
            item.item_id: each.rank for item in explained.items for each in item.stages if each.stage == "retrieval"
        }
        ranks = [place[item.item_id] for item in answer.items]
        assert ranks == sorted(ranks)
        assert len(answer.items) == 8
        with pytest.raises(ZeroDivisionError):
            ask(broken, None)


def test_ranking_given_items_falls_back_to_the_retriever_then_to_popularity(service, bundle):
    asked = RankRequest(user_id="user-1", item_ids=[f"item-{number}" for number in range(20)], at=LATER)
    lame = dataclasses.replace(bundle, ranking_model=Faulty(bundle.ranker, "score"))
    answer = Recommender(lame, service.store).rank(asked, LATER, budget())
    assert answer.degraded == ["rank"]
    neighbours = ask(Recommender(lame, service.store), budget(), k=62)
    by_retriever = [item.item_id for item in neighbours.items if item.item_id in asked.item_ids]
    assert answer.ranked == by_retriever
    lost = dataclasses.replace(lame, retriever=Faulty(bundle.retriever, "user_vectors"))
    answer = Recommender(lost, service.store).rank(asked, LATER, budget())
    assert answer.degraded == ["rank", "retrieval"]
    counts = [int(bundle.items.count[bundle.row_of[item]]) for item in answer.ranked]
    assert counts == sorted(counts, reverse=True)


def test_without_its_retriever_the_other_sources_go_on(service, bundle):
    broken = dataclasses.replace(bundle, retriever=Faulty(bundle.retriever, "user_vectors"))
    answer = ask(Recommender(broken, service.store), budget())
    assert answer.degraded == ["retrieval"]
    assert len(answer.items) == 8
    assert all("retrieval" not in item.sources for item in answer.items)


def test_without_its_store_it_takes_the_history_sent_along_else_popularity(service, bundle):
    recommender = Recommender(bundle, Faulty(service.store, "read"))
    sent = ask(recommender, budget(), history=HISTORY)
    assert (sent.degraded, sent.user_known) == ([], True)
    unknown = ask(recommender, budget())
    assert (unknown.degraded, unknown.user_known) == (["history"], False)
    assert unknown.items == ask(service.served.recommender, None, user_id="nobody").items


@given(st.sets(st.sampled_from(STAGES)))
def test_whatever_is_late_there_is_an_answer_and_it_says_so(service, late):
    answer = ask(service.served.recommender, budget(**dict.fromkeys(late, 1e-9)), k=80)
    assert set(answer.degraded) <= late
    assert {"history", "retrieval", "rank"} & late <= set(answer.degraded) or "history" in late
    assert answer.items
    assert answer.shortfall == 80 - len(answer.items)


def test_a_refusal_is_not_a_fault():
    def refuse():
        raise RequestError(422, "validation", "the request's own fault")

    ladder = Ladder(budget())
    with pytest.raises(RequestError):
        ladder.attempt("rank", refuse, None)
    assert ladder.degraded == []


@given(st.lists(st.permutations(list(range(2, 12))), min_size=2, max_size=4), st.floats(-1e6, 1e6))
def test_the_retrievers_items_come_first_in_its_order_then_the_others(orders, below):
    proposals = [
        Proposal(np.array(order[: 3 + n], np.int32), np.zeros(3 + n, np.float32)) for n, order in enumerate(orders)
    ]
    pool = merge(proposals)
    scores = retriever_order(pool, 0, below)
    ranked = pool.rows[np.argsort(-scores, kind="stable")].tolist()
    assert ranked[:3] == orders[0][:3]
    assert sorted(ranked) == sorted(pool.rows.tolist())
    assert (scores < below).all()


# --- over HTTP


def test_a_degraded_answer_is_an_answer_and_is_counted(service, bundle):
    served = service.served
    broken = dataclasses.replace(bundle, ranking_model=Faulty(bundle.ranker, "score"))
    service.swap(Served(broken, Recommender(broken, service.store)))
    try:
        with TestClient(patient_app(service)) as client:
            answer = client.post("/v1/recommend", json={"user_id": "user-1", "at": LATER})
            assert (answer.status_code, answer.json()["degraded"]) == (200, ["rank"])
            assert 'recsys_degraded_total{stage="rank"} 1.0' in client.get("/metrics").text
    finally:
        service.swap(served)


def test_a_request_whose_turn_comes_too_late_is_refused_not_served(service):
    limits = Limits(deadlines=Deadlines(request=1e-9))
    with TestClient(create_app(service, limits)) as client:
        answer = client.post("/v1/recommend", json={"user_id": "user-1"})
    assert (answer.status_code, answer.json()["code"]) == (503, "too_late")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_full_disk_takes_no_event_and_says_so(service, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    event = {"user_id": "full", "item_id": "item-1", "event_id": "full 1"}
    with TestClient(patient_app(service)) as client:
        with monkeypatch.context() as patch:
            patch.setattr("serving.event_log.os.write", full)
            refused = client.post("/v1/events", json={"events": [event]})
            erased = client.delete("/v1/users/full")
            assert (erased.status_code, erased.json()["code"]) == (503, "log_unavailable")
        assert (refused.status_code, refused.json()["code"]) == (503, "log_unavailable")
        assert "No space left" in refused.json()["detail"]
        assert client.get("/v1/users/full/history").status_code == 404
        assert client.post("/v1/events", json={"events": [event]}).json()["accepted"] == 1


def test_events_stay_durable_while_the_store_is_out(service, monkeypatch):
    event = {"user_id": "hidden", "item_id": "item-1"}
    with TestClient(patient_app(service)) as client:
        with monkeypatch.context() as patch:
            patch.setattr(service.store, "follow", lambda *_: (_ for _ in ()).throw(StoreError("away")))
            assert client.post("/v1/events", json={"events": [event]}).json()["accepted"] == 1
        client.post("/v1/events", json={"events": [{"user_id": "other", "item_id": "item-1"}]})
        assert client.get("/v1/users/hidden/history").json()["total"] == 1


def test_what_was_put_off_is_named_until_it_is_made_up_for_without_a_post(service, monkeypatch):
    monkeypatch.setattr("serving.state.RETRY_SECONDS", 0.0)
    with TestClient(patient_app(service)) as client:

        def ask() -> dict:
            return client.post("/v1/recommend", json={"user_id": "late"}).json()

        with monkeypatch.context() as patch:
            patch.setattr(service.store, "follow", lambda *_: (_ for _ in ()).throw(StoreError("full")))
            client.post("/v1/events", json={"events": [{"user_id": "late", "item_id": "item-1"}]})
            assert (ask()["degraded"], ask()["history_events"]) == (["history"], 0)
            assert client.post("/v1/rank", json={"user_id": "u", "item_ids": ["i"]}).json()["degraded"] == ["history"]
        assert (ask()["degraded"], ask()["history_events"]) == ([], 1)


def test_what_a_new_bundle_knows_is_learned_later_where_the_store_is_out(service, monkeypatch):
    monkeypatch.setattr("serving.state.RETRY_SECONDS", 0.0)
    service.record(EventsRequest(events=[EventIn(user_id="early", item_id="of tomorrow")]))
    learned: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(service.store, "learn", lambda *_: (_ for _ in ()).throw(StoreError("away")))
        service.swap(dataclasses.replace(service.served))
        patch.setattr(service.store, "learn", lambda *_: learned.append("learned"))
        service.record(EventsRequest(events=[EventIn(user_id="early", item_id="item-1")]))
        service.record(EventsRequest(events=[EventIn(user_id="early", item_id="item-1")]))
    assert learned == ["learned"]
    service.record(EventsRequest(events=[EventIn(user_id="early", item_id="item-1")]))
    assert len(service.store.read("early")) == 4


def test_work_that_does_not_end_makes_the_process_unhealthy(service):
    go = threading.Event()
    app = patient_app(service, stuck_seconds=0.05)
    worker: Worker = app.state.worker
    assert app.state.busy_seconds() <= 0.05
    with TestClient(app) as client:
        assert eventually(lambda: client.get("/livez").status_code == 200)  # its first check may be under way
        done = worker._thread.submit(worker._timed, go.wait, None)
        assert eventually(lambda: client.get("/livez").status_code != 200)
        stuck = client.get("/livez")
        go.set()
        done.result(WAIT)
        assert (stuck.status_code, stuck.json()["code"]) == (503, "stuck")
        assert client.get("/livez").status_code == 200


# --- killed


SERVER = """
import sys
from pathlib import Path
from serving.host import ServeConfig, run_bare
run_bare(ServeConfig(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), port=int(sys.argv[4])))
"""


def serve(place: Place, state: Path, port: int) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, "-c", SERVER, place.bundle, place.snapshot, state, str(port)])

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=WAIT).status_code == 200
        return False

    if eventually(lambda: server.poll() is not None or ready()) and server.poll() is None:
        return server
    server.kill()
    raise AssertionError("the server did not come up")


@pytest.mark.slow
def test_a_killed_service_has_every_acknowledged_event_when_it_starts_again(place, tmp_path):
    port, acknowledged, ended = free_port(), [], threading.Event()
    server = serve(place, tmp_path, port)

    def post() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT) as client:
            while not ended.is_set():
                number = len(acknowledged)
                event = {"user_id": f"killed-{number % 7}", "item_id": "item-1", "event_id": f"killed {number}"}
                try:
                    if client.post("/v1/events", json={"events": [event]}).status_code == 200:
                        acknowledged.append(event)
                except httpx.TransportError:
                    return

    thread = threading.Thread(target=post)
    thread.start()
    try:
        assert eventually(lambda: len(acknowledged) >= 50)
        server.send_signal(signal.SIGKILL)
        server.wait(WAIT)
        thread.join(WAIT)
        again = serve(place, tmp_path, port)
    finally:
        ended.set()
        server.kill()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT) as client:
            totals = [client.get(f"/v1/users/killed-{number}/history").json()["total"] for number in range(7)]
            assert len(acknowledged) <= sum(totals) <= len(acknowledged) + 1  # the last may be durable, unacknowledged
            repeated = client.post("/v1/events", json={"events": acknowledged[-40:]}).json()["verdicts"]
            assert {verdict["verdict"] for verdict in repeated} == {"duplicate"}
    finally:
        again.kill()
