"""The service over HTTP, in process: what is answered, what is refused and how, and what an event changes."""

import asyncio
import dataclasses
import http
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_world import LATER, USERS, WAIT, make_service, patient_app, publish_described, publish_world
from starlette.routing import Route
from starlette.testclient import TestClient

from ranking.batch import FIRST_ITEM
from ranking.content_vectors import ContentVectors
from ranking.snapshot import SnapshotReader, write_snapshot
from recsys.errors import StoreError
from recsys.history import Events, Histories
from recsys.messages import RankRequest, RecommendRequest
from recsys.stores import Event
from serving.event_log import SegmentLog
from serving.frame import Frame
from serving.settings import ServeConfig, load_into, open_service
from serving.state import position_clock
from serving.view import MAX_USER_BYTES


@pytest.fixture
def service(place, tmp_path):
    service = make_service(place, tmp_path / "state")
    yield service
    service.close()


@pytest.fixture
def client(service):
    with TestClient(patient_app(service, body_bytes=500_000), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, *events: dict) -> dict:
    response = client.post("/v1/events", json={"events": list(events)})
    assert response.status_code == 200, response.text
    return response.json()


def recommend(client: TestClient, **fields) -> dict:
    response = client.post("/v1/recommend", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def history(client: TestClient, user: str) -> dict:
    return client.get(f"/v1/users/{user}/history").json()


# --- answers


def test_http_answers_what_the_recommender_answers(client, service):
    for user in [f"user-{number}" for number in range(USERS)] + ["nobody"]:
        asked = RecommendRequest(user_id=user, k=5, at=LATER)
        ranked = RankRequest(user_id=user, item_ids=["item-3", "no such item", "item-1"], at=LATER)
        recommender = service.served.recommender
        pairs = [
            (client.post("/v1/recommend", json=asked.model_dump()).json(), recommender.recommend(asked, LATER)),
            (client.post("/v1/rank", json=ranked.model_dump()).json(), recommender.rank(ranked, LATER)),
        ]
        for found, expected in pairs:
            assert found | {"timings": 0} == expected.model_dump(mode="json") | {"timings": 0}
    assert not found["user_known"]
    assert found["unknown_item_ids"] == ["no such item"]
    assert found["scores"][1] is None


def test_an_item_without_a_vector_has_neighbours_by_content_or_none(tmp_path):
    place = publish_world(tmp_path)
    publish_described(tmp_path / "described")
    answers = []
    for bundle in (place.bundle, tmp_path / "described"):
        service = make_service(place, tmp_path / f"state of {bundle.name}", bundle)
        with TestClient(patient_app(service)) as client:
            answers.append([client.get(f"/v1/items/{item}/similar?k=4").json() for item in ("item-60", "item-1")])
        content, items = service.served.bundle.content, service.served.bundle.items
        service.close()
    (nothing, _), (alike, plain) = answers
    assert (nothing["by"], nothing["items"], plain["by"]) == ("content", [], "vectors")
    assert (alike["by"], len(alike["items"])) == ("content", 4)
    scores = [item["score"] for item in alike["items"]]
    assert scores == sorted(scores, reverse=True)
    assert 0 < scores[-1] <= scores[0] <= 1 + 1e-6
    row = 60 + FIRST_ITEM
    dense = np.zeros((len(items), content.width))
    for other in range(len(items)):
        mine = slice(*content.offsets[other : other + 2])
        dense[other, content.column[mine]] = content.value[mine]
    wanted = dense @ dense[row]
    np.testing.assert_allclose(content.likeness(row), wanted, atol=1e-6)
    assert scores[0] == pytest.approx(np.delete(wanted, row).max(), abs=1e-6)


def test_an_item_that_content_gave_no_vector_has_neighbours_by_content(tmp_path):
    place = publish_world(tmp_path)
    vectors = ContentVectors(np.array([60 + FIRST_ITEM], np.int32), np.ones((1, 8), np.float32))
    publish_described(tmp_path / "described", vectors)
    service = make_service(place, tmp_path / "state", tmp_path / "described")
    with TestClient(patient_app(service)) as client:
        given, not_given = (client.get(f"/v1/items/{item}/similar?k=4").json() for item in ("item-60", "item-61"))
    service.close()
    assert (given["by"], not_given["by"]) == ("vectors", "content")
    assert all(item["score"] > 0 for item in not_given["items"])


def test_without_a_retriever_neighbours_are_told_by_content(tmp_path):
    place = publish_world(tmp_path)
    publish_described(tmp_path / "described", retrieves=False)
    service = make_service(place, tmp_path / "state", tmp_path / "described")
    with TestClient(patient_app(service)) as client:
        answer = client.get("/v1/items/item-1/similar?k=4")
        unknown = client.get("/v1/items/nothing/similar")
    assert (answer.status_code, answer.json()["by"], len(answer.json()["items"])) == (200, "content", 4)
    assert (unknown.status_code, unknown.json()["code"]) == (404, "unknown_item")
    service.served.bundle.__dict__["content"] = None
    with TestClient(patient_app(service)) as client:
        nothing = client.get("/v1/items/item-1/similar")
    assert (nothing.status_code, nothing.json()["code"]) == (409, "not_supported")
    assert "neither retriever nor content" in nothing.json()["detail"]
    service.close()


def test_look_ups(client, service):
    assert client.get("/v1/users?limit=3").json() == {"users": ["user-0", "user-1", "user-2"]}
    found = client.get("/v1/users/user-0/history?limit=2").json()
    times = [event["timestamp"] for event in found["events"]]
    assert len(times) == 2
    assert times == sorted(times, reverse=True)
    assert found["total"] > 2
    assert found["events"][0]["name"] == found["events"][0]["item_id"].replace("item-", "Item number ")
    similar = client.get("/v1/items/item-1/similar?k=3").json()["items"]
    assert "item-1" not in [item["item_id"] for item in similar]
    assert [item["score"] for item in similar] == sorted((item["score"] for item in similar), reverse=True)
    assert len(similar) == 3
    models = client.get("/v1/models").json()
    assert models["version"] == service.version
    assert {entry["role"]: entry["name"] for entry in models["models"]} == {
        "ranker": "personal_frequency",
        "retriever": "mqsa_ted",
    }


def test_probes_page_and_schema(client, service):
    assert client.get("/livez").text == "ok"
    assert client.get("/readyz").text == f"ready {service.version}"
    assert "<form" in client.get("/").text
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/v1/recommend",
        "/v1/rank",
        "/v1/events",
        "/v1/availability",
        "/v1/users",
        "/v1/users/{user_id}",
        "/v1/users/{user_id}/history",
        "/v1/items",
        "/v1/items/{item_id}/similar",
        "/v1/models",
        "/v1/search",
        "/v1/rerank",
        "/livez",
        "/readyz",
        "/metrics",
    }
    for path in ("/v1/recommend", "/v1/rank", "/v1/events"):
        answers = schema["paths"][path]["post"]["responses"]
        assert "application/json" in answers["200"]["content"]
        for refused in ("4XX", "503"):
            assert list(answers[refused]["content"]) == ["application/problem+json"]


def test_every_answer_has_its_id_and_its_stages(client):
    asked = client.post("/v1/recommend", json={"user_id": "user-1"}, headers={"x-request-id": "mine"})
    assert asked.headers["x-request-id"] == "mine"
    stages = dict(part.split(";dur=") for part in ", ".join(asked.headers.get_list("server-timing")).split(", "))
    assert set(stages) > {"queue", "encode", "score", "http"}
    assert float(stages["http"]) >= float(stages["score"])
    ids = {client.get("/nowhere").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


# --- events


def test_an_event_is_used_by_the_very_next_request(client):
    for user in ("user-3", "a user nobody has seen"):
        for number in range(30):
            before = recommend(client, user_id=user, k=60)["history_events"]
            post(client, {"user_id": user, "item_id": f"item-{number}"})
            after = recommend(client, user_id=user, k=60)
            assert after["history_events"] == before + 1
            assert after["user_known"]
            assert f"item-{number}" == history(client, user)["events"][0]["item_id"]
    assert client.get("/v1/users?limit=1").json()["users"] in (["user-3"], ["a user nobody has seen"])


def test_events_count_from_their_own_moment_on(client):
    post(client, {"user_id": "new", "item_id": "item-1", "timestamp": LATER})
    post(client, {"user_id": "new", "item_id": "item-2", "timestamp": LATER - 10})  # late, goes before it
    known = [recommend(client, user_id="new", at=at)["history_events"] for at in (LATER - 10, LATER, LATER + 1)]
    assert known == [0, 1, 2]
    assert [event["item_id"] for event in history(client, "new")["events"]] == ["item-1", "item-2"]


def test_verdicts(client):
    posted = {"user_id": "u", "item_id": "item-1", "event_id": "one", "action": "purchase"}
    unknown = {"user_id": "u", "item_id": "not in the catalogue"}
    answer = post(client, posted, posted, unknown)
    assert [each["verdict"] for each in answer["verdicts"]] == ["accepted", "duplicate", "accepted_unknown_item"]
    assert answer["accepted"] == 2
    assert answer["verdicts"][0]["event_id"] == "one"
    assert answer["verdicts"][2]["event_id"]
    assert post(client, posted)["verdicts"][0]["verdict"] == "duplicate"
    found = history(client, "u")
    assert found["total"] == 2
    assert [(event["item_id"], event["action"]) for event in found["events"]][::-1] == [
        ("item-1", "purchase"),
        (None, ""),
    ]


def test_an_action_that_the_bundle_does_not_know_is_kept_and_told(client):
    known = {"user_id": "u", "item_id": "item-1", "action": "purchase"}
    typo = known | {"action": "Purchase", "event_id": "typo"}
    answer = post(client, known, typo, known | {"item_id": "?", "action": "look"}, known | {"action": ""})
    assert [each["verdict"] for each in answer["verdicts"]] == [
        "accepted",
        "accepted_unknown_action",
        "accepted_unknown_item",
        "accepted",
    ]
    assert answer["accepted"] == 4
    assert answer["warnings"] == [
        "action 'Purchase' is not known, but 'purchase'; its events count as of no action. Known: 'purchase'",
        "action 'look' is not known; its events count as of no action. Known: 'purchase'",
    ]
    assert "warnings" not in post(client, known, typo)  # a duplicate changes nothing
    assert 'recsys_events_total{verdict="accepted_unknown_action"} 1.0' in client.get("/metrics").text
    many = post(client, *(known | {"action": f"a{number}"} for number in range(9)))["warnings"]
    assert (len(many), many[-1]) == (6, "4 more unknown actions")


@pytest.mark.parametrize(
    ("moment", "says"),
    [
        (True, "whole number of microseconds"),
        ("1", "or ISO 8601 with its zone"),
        ("1700000000000000", "or ISO 8601 with its zone"),
        (1.5, "valid integer"),
        ("2026-03-01T09:30:00", "names no zone"),
        ("2026-03-01", "names no zone"),
        ("2026-02-30T09:30:00Z", "or ISO 8601 with its zone"),
    ],
)
def test_a_time_is_a_whole_number_or_iso_8601_with_its_zone(client, moment, says):
    event = {"user_id": "u", "item_id": "item-1", "timestamp": moment}
    answer = client.post("/v1/events", json={"events": [event]})
    (error,) = answer.json()["errors"]
    assert (answer.status_code, error["field"]) == (422, "events.0.timestamp")
    assert says in answer.json()["detail"]


def test_a_time_in_iso_8601_is_its_microsecond(client):
    written = ["2025-03-01t09:30:00z", "2025-03-01T10:30:00.000001+01:00", "2025-03-01T04:30:00.000002-05:00"]
    post(client, *({"user_id": "iso", "item_id": f"item-{n}", "timestamp": when} for n, when in enumerate(written)))
    start = 1_740_821_400_000_000
    assert [event["timestamp"] for event in history(client, "iso")["events"]] == [start + 2, start + 1, start]
    answer = recommend(client, user_id="iso", at="2025-03-01T09:30:00.000001Z")
    assert answer["history_events"] == 1
    inline = [{"item_id": "item-1", "timestamp": "2025-03-01T09:30:00Z"}]
    assert recommend(client, history=inline, at=start)["history_events"] == 0
    assert recommend(client, history=inline, at=start + 1)["history_events"] == 1


@pytest.mark.parametrize(("scale", "unit"), [(1, "seconds"), (1_000, "milliseconds")])
def test_a_time_in_another_unit_is_refused_and_not_taken_for_1970(client, scale, unit):
    moment = int(time.time()) * scale
    event = {"user_id": "u", "item_id": "item-1"}
    for path, body in (
        ("/v1/events", {"events": [event | {"timestamp": moment}]}),
        ("/v1/recommend", {"user_id": "u", "at": moment}),
        ("/v1/rank", {"history": [{"item_id": "item-1", "timestamp": moment}], "item_ids": ["item-2"]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 422
        assert f"{moment} is a time of this day and age in {unit}" in answer.json()["detail"]
    assert post(client, event | {"timestamp": 5})["accepted"] == 1  # a position, or a day in 1970


def test_an_id_used_twice_a_far_future_and_what_the_log_promises(client, service):
    one = {"user_id": "u", "item_id": "item-1", "event_id": "one"}
    now = time.time_ns() // 1000
    day = 86_400_000_000
    answer = post(client, one, one | {"item_id": "item-2"}, {**one, "event_id": "far", "timestamp": now + 2 * day})
    assert [each["verdict"] for each in answer["verdicts"]] == ["accepted", "conflict", "refused_future"]
    assert answer["accepted"] == 1
    assert post(client, one | {"timestamp": 5})["verdicts"][0]["verdict"] == "duplicate"  # the service gave the time
    soon = {"user_id": "u", "item_id": "item-3", "event_id": "soon", "timestamp": now + day // 2}
    assert post(client, soon, soon | {"timestamp": now})["accepted"] == 1  # the second of them is another event
    assert recommend(client, user_id="u")["history_events"] == 1  # what is to come is not used
    assert recommend(client, user_id="u", at=now + day)["history_events"] == 2
    told = client.get("/v1/models").json()
    assert (told["event_log"]["durability"], told["event_log"]["recovered_tails"]) == ("os", 0)
    assert told["history_store"] == {
        "kind": "lmdb",
        "available": True,
        "position": told["event_log"]["end"],
        "unknown_events": 0,
    }


def test_over_a_log_of_positions_now_is_one_step_beyond_its_end(place, tmp_path):
    known = SnapshotReader(place.snapshot)
    users = known.users(USERS)
    runs = [known.read(user) for user in users]
    ordered = [Events(run.item, run.action, np.arange(len(run))) for run in runs]
    offsets = np.concatenate([[0], np.cumsum([len(run) for run in ordered])])
    write_snapshot(tmp_path / "snapshot", users, Histories(Events.packed(ordered), offsets), "positions")
    newest = max(len(run) for run in ordered) - 1
    assert SnapshotReader(tmp_path / "snapshot").newest == newest
    moved = dataclasses.replace(place, snapshot=tmp_path / "snapshot")
    service = make_service(moved, tmp_path / "state")
    with TestClient(patient_app(service)) as client:
        assert service.now == newest + 1
        lists = {tuple(one["item_id"] for one in recommend(client, user_id=user)["items"]) for user in users}
        assert len(lists) > USERS // 2  # by the time of day all own events are a lifetime away, and all answers alike
        for number in range(2):
            assert post(client, {"user_id": "user-0", "item_id": "item-7"})["accepted"] == 1
            assert recommend(client, user_id="user-0")["history_events"] == len(ordered[0]) + number + 1
        own = service.now + 5  # a client that counts by itself
        assert post(client, {"user_id": "user-0", "item_id": "item-9", "timestamp": own})["accepted"] == 1
        assert recommend(client, user_id="user-0")["history_events"] == len(ordered[0]) + 3
        beside = SegmentLog(tmp_path / "state" / "log", "os")  # another process of the service
        beside.append([Event("of another", "user-0", "item-8", own + 7, stamped=True)])
        beside.close()
        assert service.now == own + 8
        assert post(client, {"user_id": "user-0", "item_id": "item-7"})["accepted"] == 1
        assert recommend(client, user_id="user-0")["history_events"] == len(ordered[0]) + 5
        today = {"user_id": "user-0", "item_id": "item-8", "timestamp": time.time_ns() // 1000}
        assert post(client, today)["verdicts"][0]["verdict"] == "refused_future"
    service.close()


def test_times_of_day_in_a_log_of_positions_are_told_and_not_used(tmp_path, caplog):
    log = SegmentLog(tmp_path / "log", "os")
    log.append([Event("before", "u", "item-1", time.time_ns() // 1000, stamped=True)])
    clock = position_clock(41, log)
    assert "stamped by the time of day" in caplog.text
    assert clock() == 42
    log.append([Event("after", "u", "item-1", clock(), stamped=True)])
    assert clock() == 43
    log.close()


def test_an_old_snapshot_is_told(place, tmp_path, caplog):
    make_service(place, tmp_path / "state").close()
    assert "days old" in caplog.text


def test_a_clock_that_steps_back_changes_no_order_unless_it_was_far_ahead(place, tmp_path):
    now = [LATER]
    service = make_service(place, tmp_path)
    service.state.clock = lambda: now[0]
    with TestClient(patient_app(service)) as client:
        for number, moment in enumerate([LATER, LATER - 5, LATER - 30_000_000, LATER - 120_000_000]):
            now[0] = moment
            post(client, {"user_id": "u", "item_id": f"item-{number}"})
            now[0] += number == 3  # only then is the clock itself believed
            assert recommend(client, user_id="u")["history_events"] == (number + 1 if number < 3 else 1)
        events = history(client, "u")["events"]
        assert [(event["item_id"], event["timestamp"] - LATER) for event in events] == [
            ("item-2", 2),
            ("item-1", 1),
            ("item-0", 0),
            ("item-3", -120_000_000),
        ]
    service.close()


def test_a_hundred_thousand_events_in_one_post_are_refused_at_once(client, service):
    event = {"user_id": "u", "item_id": "item-1"}
    body = json.dumps({"events": [event] * 100_000})
    answer = client.post("/v1/events", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
    assert service.models().event_log.end == 0


def test_a_torn_tail_is_told_after_the_restart_that_cut_it_off(place, tmp_path):
    service = make_service(place, tmp_path)
    with TestClient(patient_app(service)) as client:
        post(client, {"user_id": "u", "item_id": "item-1"})
    service.close()
    (path,) = (tmp_path / "log").glob("*.jsonl")
    with path.open("ab") as file:
        file.write(b'0000abcd {"id":"half a rec')
    SegmentLog(tmp_path / "log", "os").close()  # not the process that is asked later
    service = make_service(place, tmp_path)
    with TestClient(patient_app(service)) as client:
        told = client.get("/v1/models").json()["event_log"]
        assert (told["recovered_tails"], told["recovered_bytes"]) == (1, 26)
        assert "recsys_event_log_torn_bytes 26.0" in client.get("/metrics").text
        assert history(client, "u")["total"] == 1
    service.close()


def test_a_store_that_is_gone_degrades_answers_and_catches_up(place, tmp_path, monkeypatch):
    service = make_service(place, tmp_path)
    with TestClient(patient_app(service)) as client:
        inline = {"history": [{"item_id": "item-1", "timestamp": 1}]}
        with monkeypatch.context() as gone:
            for name in ("observe", "follow", "parts"):
                gone.setattr(service.store, name, _gone)
            assert post(client, {"user_id": "u", "item_id": "item-1"})["accepted"] == 1
            answer = recommend(client, user_id="user-1")
            assert (answer["degraded"], answer["user_known"], len(answer["items"])) == (["history"], False, 10)
            assert (recommend(client, **inline)["degraded"], recommend(client, **inline)["user_known"]) == ([], True)
            unknown = {"user_id": "user-1", "filters": [{"column": "?", "deny": ["a"]}]}
            assert client.post("/v1/recommend", json=unknown).status_code == 422
            assert recommend(client, **inline)["degraded"] == []  # what was refused before has no part in this
            refused = client.delete("/v1/users/u")
            assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
        post(client, {"user_id": "u", "item_id": "item-2"})
        assert recommend(client, user_id="u")["degraded"] == []
        assert history(client, "u")["total"] == 2
    service.close()


def _gone(*_) -> None:
    raise StoreError("gone")


def test_events_and_their_ids_survive_a_restart_and_a_death_between_log_and_view(place, tmp_path):
    service = make_service(place, tmp_path)
    with TestClient(patient_app(service)) as client:
        post(client, {"user_id": "u", "item_id": "item-1", "event_id": "one"})
    service.close()
    log = SegmentLog(tmp_path / "log", "os")
    log.append([Event("two", "u", "item-2", LATER)])  # its writer died before the view heard of it
    log.close()
    service = make_service(place, tmp_path)
    with TestClient(patient_app(service)) as client:
        assert history(client, "u")["total"] == 2
        assert post(client, {"user_id": "u", "item_id": "item-1", "event_id": "one"})["accepted"] == 0
    service.close()


def test_a_new_bundle_gives_unknown_items_their_names(place, tmp_path):
    service = make_service(place, tmp_path, place.smaller)
    with TestClient(patient_app(service)) as client:
        new_item = {"user_id": "u", "item_id": "item-61"}
        assert post(client, new_item)["verdicts"][0]["verdict"] == "accepted_unknown_item"
        assert history(client, "u")["events"][0]["item_id"] is None
        load_into(service, place.bundle)
        assert history(client, "u")["events"][0]["item_id"] == "item-61"
        assert post(client, new_item)["verdicts"][0]["verdict"] == "accepted"
    service.close()


def test_a_swap_loses_no_request_and_mixes_no_bundles(place, tmp_path):
    service = make_service(place, tmp_path)
    versions = {service.version: 62}
    asked = {"user_id": "user-1", "k": 100, "at": LATER}
    app = patient_app(service)
    with TestClient(app) as client, ThreadPoolExecutor(2) as clients:
        ended = threading.Event()

        def ask() -> list[dict]:
            answers = []
            while not ended.is_set():
                answers.append(recommend(client, **asked))
            return answers

        asking = [clients.submit(ask) for _ in range(2)]
        for bundle in (place.smaller, place.bundle, place.smaller):
            load_into(service, bundle)
            versions[service.version] = 62 if bundle == place.bundle else 60
        ended.set()
        answers = [answer for future in asking for answer in future.result()]
        expected = dict.fromkeys(versions)
        for answer in answers:
            found = answer | {"timings": 0}
            assert expected[found["model_version"]] in (None, found)
            expected[found["model_version"]] = found
            assert len(found["items"]) <= versions[found["model_version"]]
    service.close()
    assert len(versions) == 2


# --- refusals

JSON = {"content-type": "application/json"}
USER = {"user_id": "u"}
EVENT = {"user_id": "u", "item_id": "item-1"}
LONG = {"user_id": "ä" * (MAX_USER_BYTES // 2 + 1), "item_id": "i"}
ITEM, PAST = {"item_ids": ["i"]}, {"item_id": "i", "timestamp": 1}
ENDLESS = b'{"user_id": "u", "filters": [{"column": "price", "at_least": Infinity}]}'
LONG_COLUMN = {"column": "c" * 513, "deny": []}
NAN = b'{"events": [{"user_id": "u", "item_id": "i", "value": NaN}]}'
REFUSALS = {
    "malformed JSON": ("recommend", b'{"user_id": ', 400, "malformed_json", "not JSON"),
    "bytes that are no text": ("recommend", b'{"user_id": "\xff"}', 400, "malformed_json", "JSON"),
    "negative k": ("recommend", USER | {"k": -1}, 422, "validation", "k: "),
    "k of text": ("recommend", USER | {"k": "ten"}, 422, "validation", "'ten'"),
    "unknown field": ("recommend", USER | {"kk": 1}, 422, "validation", "kk: "),
    "neither user nor history": ("recommend", {"k": 3}, 422, None, "user_id"),
    "moment beyond 64 bits": ("recommend", USER | {"at": 2**70}, 422, None, "at"),
    "half a surrogate": ("recommend", b'{"user_id": "\\ud800"}', 422, "validation", "user_id"),
    "half a surrogate in a filter": (
        "recommend",
        b'{"user_id": "u", "filters": [{"column": "item_id", "deny": ["\\ud800"]}]}',
        422,
        "validation",
        "filters.0",
    ),
    "not an object": ("recommend", [1], 422, "validation", "body"),
    "no body": ("recommend", b"", 422, "validation", "body"),
    "no items": ("rank", USER | {"item_ids": []}, 422, "validation", "item_ids"),
    "missing items": ("rank", USER, 422, "validation", "item_ids"),
    "too many candidates": ("rank", USER | {"item_ids": ["i"] * 10_001}, 413, "too_many_candidates", "10000"),
    "too many bytes": ("rank", b" " * 500_001, 413, "body_too_large", "500000"),
    "no events": ("events", {"events": []}, 422, "validation", "events"),
    "too many events": ("events", {"events": [EVENT] * 1_001}, 413, "too_many_events", "1000"),
    "event without user": ("events", {"events": [EVENT, {"item_id": "i"}]}, 422, "validation", "events.1.user_id"),
    "event of a long user": ("events", {"events": [EVENT, LONG]}, 422, "validation", "events.1.user_id"),
    "event out of time": ("events", {"events": [EVENT | {"timestamp": -(2**63)}]}, 422, "validation", "timestamp"),
    "event of NaN": ("events", NAN, 422, "validation", "events.0.value"),
    "history of too many": ("rank", ITEM | {"history": [PAST] * 10_001}, 413, "too_many_events", "10000"),
    "limit without end": ("recommend", ENDLESS, 422, "validation", "at_least"),
    "filter of a long column": ("recommend", USER | {"filters": [LONG_COLUMN]}, 422, "validation", "filters.0.column"),
    "slash too many": ("/v1/recommend/", None, 404, "unknown_route", "/v1/recommend/"),
    "user without a name": ("/v1/users//history", None, 422, "validation", "user_id"),
    "user of other bytes": ("/v1/users/Jos%E9/history", None, 422, "validation", "not UTF-8"),
    "unknown route": ("/v1/recommendations", None, 404, "unknown_route", "/v1/recommendations"),
    "unknown user": ("/v1/users/nobody/history", None, 404, "unknown_user", "nobody"),
    "unknown item": ("/v1/items/nothing/similar", None, 404, "unknown_item", "nothing"),
    "query out of range": ("/v1/users?limit=0", None, 422, "validation", "limit: "),
    "search of a long text": (f"/v1/items?query={'a' * 513}", None, 422, "validation", "query: "),
    "wrong method": ("/v1/recommend", None, 405, "method_not_allowed", "GET"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_what_is_wrong_under_a_stable_code(client, case):
    route, body, status, code, told = REFUSALS[case]
    if body is None:
        response = client.get(route)
    else:
        content = body if isinstance(body, bytes) else json.dumps(body)
        response = client.post(f"/v1/{route}", content=content, headers=JSON)
    found = response.json()
    assert (response.status_code, found["status"]) == (status, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert found["title"] == http.HTTPStatus(status).phrase
    if code is not None:
        assert found["code"] == code
        assert found["type"] == f"urn:recsys:problem:{code}"
    assert told in found["detail"].replace(",", "")
    assert client.get("/v1/users/u/history").status_code == 404  # nothing was written


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/events", {"events": [0] * 1000}),
        ("/v1/rank", {"user_id": "u", "item_ids": [0] * 100_000}),
        ("/v1/rank", {"item_ids": ["i"], "history": [0] * 10_000}),
        ("/v1/recommend", {"user_id": "u", "filters": [{"column": "item_id", "deny": [0] * 100_000}]}),
        ("/v1/rerank", {"query": "q", "documents": [0] * 100_000}),
        ("/v1/availability", {"available": dict.fromkeys(map(str, range(10_000)), "perhaps")}),
    ],
)
def test_of_a_list_of_wrong_entries_the_first_is_told(client, route, body):
    refused = client.request("PUT" if "availability" in route else "POST", route, json=body)
    assert refused.status_code == 422
    assert len(refused.json()["errors"]) <= 2  # a union tells of both its forms
    assert len(refused.content) < 2_000


def test_a_method_that_does_not_fit_is_told_all_that_do(client):
    for path, methods in {
        "/v1/items/item-1/similar": {"GET", "POST"},
        "/v1/availability": {"GET", "PUT"},
        "/v1/rank": {"POST"},
    }.items():
        refused = client.patch(path)
        assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, methods)


@pytest.mark.parametrize("declared", ["text/plain", "text/json", "application/jsonx", None])
def test_a_body_is_read_only_where_it_is_declared_as_json(client, declared):
    headers = {} if declared is None else {"content-type": declared}
    for method, path, body in (("PUT", "availability", '{"available": {"x": true}}'), ("POST", "rank", "{}")):
        refused = client.request(method, f"/v1/{path}", content=body, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (415, "unsupported_media_type")
    taken = client.put("/v1/availability", content=body, headers={"content-type": "application/json; charset=utf-8"})
    assert taken.json()["code"] == "validation"


def test_a_client_that_has_gone_is_no_defect_of_the_service(service):
    async def leaving() -> None:
        async def inside(scope, receive, send):
            scope["route"] = Route("/v1/rank", lambda _: None)
            raise asyncio.CancelledError

        scope = {"type": "http", "headers": [], "method": "POST"}
        await Frame(inside, service.telemetry, 1000, False)(scope, None, None)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(leaving())
    told = service.telemetry.scrape().decode()
    assert 'recsys_http_request_seconds_count{method="POST",route="/v1/rank",status="499"} 1.0' in told


def test_a_body_that_is_not_declared_as_json_or_comes_in_chunks_beyond_the_bound(client):
    form = client.post("/v1/recommend", content=b"{}", headers={"content-type": "application/x-www-form-urlencoded"})
    assert (form.status_code, form.json()["code"]) == (415, "unsupported_media_type")
    chunked = client.post("/v1/rank", content=iter([b" " * 300_000] * 2), headers=JSON)
    assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")


def test_before_a_bundle_is_loaded_it_is_alive_but_not_ready(place, tmp_path):
    service = open_service(ServeConfig(place.bundle, place.snapshot, tmp_path))
    with TestClient(patient_app(service)) as client:
        assert client.get("/livez").status_code == 200
        for response in (client.get("/readyz"), client.post("/v1/recommend", json=USER)):
            assert (response.status_code, response.json()["code"]) == (503, "not_ready")
            assert response.headers["retry-after"] == "1"
        load_into(service, place.bundle)
        assert client.get("/readyz").status_code == 200
    service.close()


class Blocked:
    """A recommender that waits until it is let go, or fails."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()

    def recommend(self, request: RecommendRequest, now: int, budget=None):
        self.entered.release()
        assert self.go.wait(WAIT)
        return self.inner.recommend(request, now)

    def rank(self, request: RankRequest, now: int, budget=None):
        raise ZeroDivisionError("secret of the implementation")


def test_overload_is_told_at_once_and_passes(service):
    blocked = Blocked(service.served.recommender)
    service.swap(dataclasses.replace(service.served, recommender=blocked))
    with (
        TestClient(patient_app(service, waiting=1)) as client,
        ThreadPoolExecutor(1) as clients,
    ):
        first = clients.submit(recommend, client, user_id="user-1")
        assert blocked.entered.acquire(timeout=WAIT)
        refused = client.post("/v1/recommend", json=USER)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/livez").status_code == 200  # the probes do not wait in the queue
        blocked.go.set()
        assert first.result()["user_known"]
        assert recommend(client, user_id="user-1")["user_known"]


def test_a_defect_is_told_without_its_details(service):
    service.swap(dataclasses.replace(service.served, recommender=Blocked(service.served.recommender)))
    with TestClient(patient_app(service), raise_server_exceptions=False) as client:
        response = client.post("/v1/rank", json=USER | {"item_ids": ["item-1"]})
        assert (response.status_code, response.json()["code"]) == (500, "internal")
        assert response.headers["x-request-id"]
        assert "secret" not in response.text
        assert "Zero" not in response.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ["user_id", "k", "at", "history", "exclude_seen", "item_ids", "events", "item_id", "timestamp", "action"]
NESTED = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4)
BODIES = st.dictionaries(st.sampled_from(FIELDS), VALUES | st.lists(NESTED, max_size=2), max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=st.sampled_from(["recommend", "rank", "events"]), body=BODIES | VALUES)
def test_no_body_makes_it_fail(client, route, body):
    response = client.post(f"/v1/{route}", content=json.dumps(body), headers=JSON)
    assert response.status_code in (200, 400, 413, 422), response.text
    if response.status_code != 200:
        assert response.json()["code"] != "internal"


# --- metrics


def test_metrics_count_by_route_and_never_name_anybody(client):
    recommend(client, user_id="secret-user")
    post(client, {"user_id": "secret-user", "item_id": "secret-item"})
    client.get("/v1/users/secret-user/history")
    client.get("/v1/users/another-secret-user/history")
    client.get("/secret-path")
    client.request("SECRET", "/v1/recommend")
    client.post("/v1/rank", json={"user_id": "secret-user", "item_ids": ["secret-item", "item-1"]})
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def count(route: str, method: str, status: int) -> float:
        return float(lines[f'recsys_http_request_seconds_count{{method="{method}",route="{route}",status="{status}"}}'])

    assert count("/v1/recommend", "POST", 200) == 1
    assert count("/v1/users/{user_id}/history", "GET", 200) == 1
    assert count("/v1/users/{user_id}/history", "GET", 404) == 1
    assert count("unmatched", "GET", 404) == 1
    assert float(lines["recsys_unknown_users_total"]) == 1
    assert float(lines["recsys_unknown_items_total"]) == 1
    assert float(lines['recsys_events_total{verdict="accepted_unknown_item"}']) == 1
    assert float(lines["recsys_rank_candidates_sum"]) == 2
    assert float(lines['recsys_stage_seconds_count{stage="encode"}']) >= 1
    assert "secret" not in text


@pytest.mark.parametrize("odd", ["\n", "\na", "a\nb", "\r\n", "a/b\n"])
def test_an_id_with_a_line_end_names_itself_and_nobody_else(place, tmp_path, odd):
    service = make_service(place, tmp_path / "state")
    with TestClient(patient_app(service)) as client:
        for user in ("user-1", f"user-1{odd}"):
            client.post("/v1/events", json={"events": [{"user_id": user, "item_id": "item-1"}]})
        quoted = quote(f"user-1{odd}", safe="")
        assert client.get(f"/v1/users/{quoted}/history").json()["user_id"] == f"user-1{odd}"
        assert client.delete(f"/v1/users/{quoted}").json()["user_id"] == f"user-1{odd}"
        assert client.get(f"/v1/users/{quoted}/history").status_code == 404
        assert client.get("/v1/users/user-1/history").json()["total"] > 1
    service.close()


def test_parameters_that_mean_nothing_are_refused_by_name(client):
    for path, name, there in [
        ("/v1/items?q=kettle", "q", "`query`, `limit`"),
        ("/v1/items/item-1/similar?limit=3", "limit", "`k`"),
        ("/v1/models?k=3", "k", "none"),
    ]:
        refused = client.get(path)
        assert (refused.status_code, refused.json()["code"]) == (422, "validation")
        assert refused.json()["detail"] == f"query.{name}: no such parameter; there are: {there}"
    assert client.get("/?words=tea").status_code == 200
    assert client.get("/metrics?name=x").status_code == 200
