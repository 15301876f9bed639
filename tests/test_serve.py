"""The service under Ray Serve: one real application, started once for all tests of this file."""

import http.client
import json
import os
import select
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from serving_world import LATER, PATIENT, WAIT, Place, free_port, make_service, publish_world

from recsys.errors import BundleError, ConfigError, DataError, RecsysError
from recsys.messages import EventIn, RankRequest, RecommendRequest
from serving import host
from serving.app import Limits
from serving.client import Client
from serving.host import Running, ServeConfig, start
from serving.problems import Problem
from serving.replies import PROBLEM

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray's own


def config(place: Place, state: Path, port: int) -> ServeConfig:
    return ServeConfig(place.bundle, place.snapshot, state, port=port)


@pytest.fixture(scope="module")
def running(place, tmp_path_factory):
    two = replace(
        config(place, tmp_path_factory.mktemp("state"), free_port()), replicas=2, limits=Limits(deadlines=PATIENT)
    )
    with start(two) as running:
        yield running


def call(running: Running, method: str, path: str, body=None, headers=None) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers (names in lower case) and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection(running.address.removeprefix("http://"), timeout=WAIT)
    content = body if isinstance(body, bytes) or body is None else json.dumps(body)
    connection.request(method, path, content, {"Content-Type": "application/json"} | (headers or {}))
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, data


def replicas(running: Running) -> list[psutil.Process]:
    """Return the processes of the replicas of the service that this process has started."""
    started = psutil.Process().children(recursive=True)
    return [process for process in started if any("ServeReplica" in word for word in process.cmdline())]


def post(running: Running, path: str, body) -> dict:
    status, _, data = call(running, "POST", path, body)
    assert status == 200, data
    return json.loads(data)


# --- what is refused before anything is started


def test_a_port_in_use_and_damaged_files_are_refused_before_ray_starts(place, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1"):
            start(config(place, tmp_path, port))
    damaged = publish_world(tmp_path / "damaged")
    weights = next(damaged.bundle.glob("models/*"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="sha256"):
        start(config(damaged, tmp_path, free_port()))
    with pytest.raises(DataError, match=r"snapshot.json"):
        start(replace(config(place, tmp_path, free_port()), snapshot=tmp_path / "nowhere"))
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / f"{0:020d}.jsonl").write_text("no record\n")
    with pytest.raises(DataError, match="damaged record"):
        start(config(place, tmp_path, free_port()))
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.mark.parametrize(("key", "value"), [("port", 0), ("replicas", 0), ("cores", 0), ("window", 0)])
def test_a_setting_out_of_range_is_named(place, tmp_path, key, value):
    with pytest.raises(ConfigError, match=f"{key} is 0"):
        replace(config(place, tmp_path, 8000), **{key: value})


# --- what is served


@pytest.mark.slow
@pytest.mark.serve
def test_ray_is_started_again_with_other_ports_where_it_does_not_start(place, tmp_path, monkeypatch):
    """A port that was free when it was chosen may be taken when Serve's proxy gets to it."""
    names = [f"RAY_SERVE_{name}_PORT" for name in ("FALLBACK_PROXY_HTTP", "HAPROXY_METRICS")]
    for name in (*names, "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT"):
        monkeypatch.setenv(name, "")  # put back afterwards
    tried = []

    def init(**options):
        tried.append([os.environ[name] for name in names])
        raise RuntimeError(f"Failed to bind to address '127.0.0.1:{os.environ[names[0]]}'.")

    ray = SimpleNamespace(init=init, shutdown=lambda: None, serve=None)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(RecsysError, match="Ray did not start: Failed to bind"):
        host._start_ray(config(place, tmp_path / "state", free_port()), tmp_path)
    assert len(tried) == host.RAY_TRIES > 1
    for ports in zip(*tried, strict=True):
        assert len(set(ports)) > 1


class TestServed:
    """Two replicas over one log and one view."""

    def test_answers_are_those_of_the_recommender(self, running, place, tmp_path):
        recommender = make_service(place, tmp_path).served.recommender
        for user in ("user-0", "user-7", "nobody"):
            asked = RecommendRequest(user_id=user, k=20, at=LATER)
            found = post(running, "/v1/recommend", asked.model_dump())
            assert found | {"timings": 0} == recommender.recommend(asked, LATER).model_dump(mode="json") | {
                "timings": 0
            }
            ranked = RankRequest(user_id=user, item_ids=["item-5", "?", "item-1"], at=LATER)
            found = post(running, "/v1/rank", ranked.model_dump())
            expected = recommender.rank(ranked, LATER).model_dump(mode="json")
            assert found | {"timings": 0} == expected | {"timings": 0}

    def test_an_event_is_used_by_the_very_next_request_of_whichever_replica(self, running):
        for number in range(40):
            event = {"user_id": "fresh", "item_id": f"item-{number}", "event_id": f"fresh {number}"}
            assert post(running, "/v1/events", {"events": [event]})["accepted"] == 1
            assert post(running, "/v1/recommend", {"user_id": "fresh"})["history_events"] == number + 1
            assert post(running, "/v1/events", {"events": [event]})["verdicts"][0]["verdict"] == "duplicate"

    @pytest.mark.parametrize(
        ("method", "path", "body", "status", "code"),
        [
            ("POST", "/v1/recommend", b'{"k": ', 400, "malformed_json"),
            ("POST", "/v1/recommend", {"user_id": "u", "k": -1}, 422, "validation"),
            ("POST", "/v1/rank", {"user_id": "u", "item_ids": ["i"] * 10_001}, 413, "too_many_candidates"),
            ("POST", "/v1/rank", b" " * (8 * 2**20 + 1), 413, "body_too_large"),
            ("GET", "/nowhere", None, 404, "unknown_route"),
            ("GET", "/v1/users/nobody/history", None, 404, "unknown_user"),
        ],
    )
    def test_refusals_are_problem_documents_here_too(self, running, method, path, body, status, code):
        found, headers, data = call(running, method, path, body)
        assert (found, json.loads(data)["code"]) == (status, code)
        assert headers["content-type"] == "application/problem+json"

    def test_probes_schema_and_one_id_per_answer(self, running):
        assert call(running, "GET", "/readyz")[2].startswith(b"ready ")
        assert call(running, "GET", "/livez")[0] == 200
        assert "/v1/recommend" in json.loads(call(running, "GET", "/openapi.json")[2])["paths"]
        assert b"<form" in call(running, "GET", "/")[2]
        _, headers, _ = call(running, "GET", "/livez", headers={"x-request-id": "mine"})
        assert headers["x-request-id"] == "mine"
        assert "http;dur=" in headers["server-timing"]

    def test_a_scrape_counts_the_requests_of_all_replicas(self, running):
        def counted() -> float:
            text = call(running, "GET", "/metrics")[2].decode()
            lines = [line for line in text.splitlines() if line.startswith("recsys_http_request_seconds_count")]
            return sum(float(line.rsplit(" ", 1)[1]) for line in lines if 'route="/v1/models"' in line)

        before = counted()
        for _ in range(30):
            assert call(running, "GET", "/v1/models")[0] == 200
        assert {counted() for _ in range(5)} == {before + 30}

    def test_a_swap_loses_no_request_and_a_refused_bundle_changes_nothing(self, running, place, tmp_path):
        old = json.loads(call(running, "GET", "/v1/models")[2])["version"]
        ended = threading.Event()

        def ask() -> list[str]:
            versions = []
            while not ended.is_set():
                versions.append(post(running, "/v1/recommend", {"user_id": "user-1", "at": LATER})["model_version"])
            return versions

        with ThreadPoolExecutor(2) as clients:
            asking = [clients.submit(ask) for _ in range(2)]
            try:
                new = running.swap(place.smaller)
                after = post(running, "/v1/recommend", {"user_id": "user-1"})["model_version"]
                broken = publish_world(tmp_path / "broken").bundle
                (broken / "golden.json").write_text("{}")
                with pytest.raises(BundleError):
                    running.swap(broken)
            finally:
                ended.set()
            seen = {version for future in asking for version in future.result()}
        assert new == after != old
        assert seen == {old, new}
        assert {json.loads(call(running, "GET", "/v1/models")[2])["version"] for _ in range(8)} == {new}

    def test_a_swap_right_after_a_kill_is_taken_by_every_replica(self, running, place):
        old = json.loads(call(running, "GET", "/v1/models")[2])["version"]
        with Client(running.address, timeout=WAIT) as client:  # it sends again once
            replicas(running)[0].kill()
            new = running.swap(place.bundle if running.plan.champion.version == old else place.smaller)
            assert {client.recommend("user-1", at=LATER).model_version for _ in range(8)} == {new}
        assert len(replicas(running)) == 2

    def test_a_killed_replica_costs_no_request_and_no_acknowledged_event(self, running):
        acknowledged: list[EventIn] = []
        ended = threading.Event()

        def ask(number: int) -> None:
            with Client(running.address, timeout=WAIT) as client:  # it sends again once
                for turn in range(100_000):
                    if ended.is_set():
                        return
                    client.recommend("user-1", at=LATER)
                    event = EventIn(user_id="killed", item_id="item-1", event_id=f"killed {number} {turn}")
                    client.events(event)
                    acknowledged.append(event)

        with ThreadPoolExecutor(2) as clients:
            asking = [clients.submit(ask, number) for number in range(2)]
            try:
                while len(acknowledged) < 20 and not any(future.done() for future in asking):
                    time.sleep(0.01)
                replicas(running)[0].kill()
                before = len(acknowledged)
                while len(acknowledged) < before + 200 and not any(future.done() for future in asking):
                    time.sleep(0.01)
            finally:
                ended.set()
            for future in asking:
                future.result()
        with Client(running.address, timeout=WAIT) as client:
            verdicts = client.events(*acknowledged[-900:]).verdicts
        assert {verdict.verdict for verdict in verdicts} == {"duplicate"}

    def test_a_request_that_dies_with_its_replica_is_refused_as_one_to_send_again(self, running):  # the last: all die
        port = int(os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"])  # of Serve's proxy, behind HAProxy
        head = "POST /v1/events HTTP/1.1\r\nHost: -\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", port), WAIT) as half_sent:
            half_sent.sendall(head.encode())
            poll = select.poll()  # takes any number of a file, unlike select
            poll.register(half_sent, select.POLLIN)
            while not poll.poll(1_000):  # whichever replica has it
                for replica in replicas(running):
                    replica.kill()
            answer = http.client.HTTPResponse(half_sent)
            answer.begin()
            refusal = Problem.model_validate_json(answer.read())
        assert (answer.status, answer.headers["content-type"], answer.headers["retry-after"]) == (503, PROBLEM, "1")
        assert refusal.code == "no_replica"
