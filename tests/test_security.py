"""What comes from outside: keys, bodies that mean harm, and the whole OpenAPI document tried by machine."""

import json
import logging
import os

import pytest
from fuzzing import try_requests
from serving_world import LATER, make_service, patient_app, publish_world
from starlette.testclient import TestClient
from text_world import publish_whole

from recsys.errors import ConfigError
from serving.logs import LOGS, MOST_FILES, log_to
from serving.security import KEYS, OPEN, ApiKeys, read_keys

KEY = "0123456789abcdef-secret"


@pytest.fixture(scope="module")
def guarded(service):
    with TestClient(patient_app(service, keys=ApiKeys([KEY, "another-key-of-16"]))) as client:
        yield client


# --- keys


def test_every_route_but_the_open_ones_needs_a_key(guarded):
    paths = [*guarded.get("/openapi.json").json()["paths"], "/metrics", "/v1/nowhere"]
    for path in paths:
        assert guarded.get(path).status_code == (200 if path in OPEN else 401), path
    refused = guarded.post("/v1/recommend", json={"user_id": "user-1"})
    assert (refused.json()["code"], refused.headers["www-authenticate"]) == ("unauthorized", "Bearer")
    assert refused.headers["content-type"] == "application/problem+json"
    assert guarded.get("/").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": f"Bearer {KEY}"}, 200),
        ({"Authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": "another-key-of-16"}, 200),
        ({"Authorization": f"Basic {KEY}"}, 401),
        ({"Authorization": f"Bearer {KEY}x"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": b"Bearer \xff\xfe"}, 401),
        ({"x-api-key": ""}, 401),
        ({}, 401),
    ],
)
def test_a_key_is_accepted_whole_or_not_at_all(guarded, headers, status):
    assert guarded.post("/v1/recommend", json={"user_id": "user-1"}, headers=headers).status_code == status


def test_the_schema_says_that_a_key_is_needed(guarded, service):
    assert guarded.get("/openapi.json").json()["security"] == [{"key": []}]
    with TestClient(patient_app(service)) as free:
        assert "security" not in free.get("/openapi.json").json()


def test_keys_come_from_environment_and_file_and_weak_ones_are_refused(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n")
    keys = read_keys(file, {KEYS: "from-the-environment,"})
    assert keys.accepts(KEY.encode())
    assert keys.accepts(b"from-the-environment")
    assert not keys.accepts(b"")
    assert not read_keys(None, {})
    with pytest.raises(ConfigError, match="shorter than 16"):
        read_keys(None, {KEYS: "short"})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "nowhere", {})
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        read_keys(file, {})


# --- what is written down


def test_logs_have_ids_and_routes_and_neither_keys_nor_names(service, tmp_path):
    log_to(tmp_path / LOGS, requests=True)
    with TestClient(patient_app(service, keys=ApiKeys([KEY])), raise_server_exceptions=False) as client:
        for path in ("/v1/users/secret-user/history", "/v1/items/secret-item/similar"):
            client.get(path, headers={"Authorization": f"Bearer {KEY}", "x-request-id": "mine"})
        service.swap, swap = (lambda *_: None), service.swap
        service.items, items = (lambda *_: 1 / 0), service.items
        assert client.get("/v1/items", headers={"x-api-key": KEY, "x-request-id": "broken"}).status_code == 500
        service.swap, service.items = swap, items
    logging.getLogger("serving").handlers.clear()
    text = (tmp_path / LOGS / f"{os.getpid()}.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    told = [line for line in lines if line["logger"] == "serving.requests"]
    assert [line["request_id"] for line in told] == ["mine", "mine", "broken"]
    assert told[0]["route"] == "/v1/users/{user_id}/history"
    assert (told[0]["status"], told[0]["method"]) == (404, "GET")
    [defect] = [line for line in lines if line["level"] == "error"]
    assert defect["request_id"] == "broken"
    assert "ZeroDivisionError" in defect["traceback"]
    assert "secret" not in text


OLD = 2**30
"""From here on there are no process ids."""


def test_logs_of_earlier_processes_stay_within_a_bound(tmp_path):
    for number in range(OLD, OLD + 100):
        (tmp_path / f"{number}.jsonl").write_text("x")
        os.utime(tmp_path / f"{number}.jsonl", (number, number))
    mine = f"{os.getppid()}.jsonl"  # the oldest, of a process that lives
    (tmp_path / mine).write_text("x")
    os.utime(tmp_path / mine, (0, 0))
    log_to(tmp_path, requests=False)
    logging.getLogger("serving").handlers.clear()
    kept = {path.name for path in tmp_path.glob("*.jsonl")}
    assert kept == {f"{number}.jsonl" for number in range(OLD + 100 - MOST_FILES, OLD + 100)} | {
        f"{os.getpid()}.jsonl",
        mine,
    }


def test_a_key_for_a_proxy_in_front_hides_no_key_of_the_service(service):
    with TestClient(patient_app(service, keys=ApiKeys([KEY]))) as client:
        both = {"Authorization": "Bearer of something else", "x-api-key": KEY}
        assert client.get("/v1/models", headers=both).status_code == 200
        other = {"Authorization": f"Bearer {KEY}", "x-api-key": "of something else"}
        assert client.get("/v1/models", headers=other).status_code == 200
        assert client.get("/v1/models", headers={**both, "x-api-key": "wrong"}).status_code == 401


# --- no path leads to a file


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "a/../../b", "\x00", "CON"]
)
def test_an_id_is_never_a_path(service, name, monkeypatch):
    opened = []
    with TestClient(patient_app(service)) as client:
        client.get("/livez")
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(path) or real(path, *rest, **more))
        monkeypatch.setattr("builtins.open", lambda path, *_, **__: opened.append(path))
        client.post("/v1/recommend", json={"user_id": name, "at": LATER})
        client.post("/v1/rank", json={"user_id": name, "item_ids": [name]})
        client.get(f"/v1/users/{name.replace(chr(0), '%00')}/history")
        client.get(f"/v1/items/{name.replace(chr(0), '%00')}/similar")
        client.get("/v1/items", params={"query": name})
        monkeypatch.undo()
    assert opened == []


# --- the whole document, by machine


def test_no_request_of_the_document_finds_a_defect(tmp_path):
    place = publish_world(tmp_path / "world")
    service = make_service(place, tmp_path / "state", publish_whole(tmp_path / "whole"))
    with TestClient(patient_app(service), raise_server_exceptions=False) as client:
        found = try_requests(client, examples=6)
    assert len({operation for operation, _ in found}) >= 10
    assert {200, 422} <= {status for _, status in found}
    service.close()
