"""What every store of live histories does, LMDB or Redis: a view of the log over the snapshot, entry by entry once."""

import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis_server import RedisServer, redis_server
from serving_world import LATER, make_service, patient_app, publish_world
from starlette.testclient import TestClient

from recsys.errors import ConfigError, DataError, StoreError
from recsys.history import UNKNOWN_KEY, Events
from recsys.stores import Encoder, Event, LogMark
from serving import view
from serving.event_log import SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.redis_store import RedisHistoryStore
from serving.settings import ServeConfig

KNOWN, ALL = 20, 1_000
USERS = ("a", "ab", "b", "snapshot", "ä")


class Snapshot:
    """One user with three events; contains nothing of any log, unless told."""

    id = "snapshot"
    marks: ClassVar[dict[str, LogMark]] = {}

    def read(self, user_id: str) -> Events | None:
        if user_id != "snapshot":
            return None
        return Events(np.arange(3, dtype=np.uint32), np.zeros(3, np.uint8), np.arange(3, dtype=np.int64) * 10)

    def users(self, limit: int) -> list[str]:
        return ["snapshot"][:limit]

    def mark(self, log: str) -> LogMark:
        return self.marks.get(log, LogMark(log))


def encoder(known: int) -> Encoder:
    return Encoder(lambda item: int(item) if int(item) < known else UNKNOWN_KEY, len)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["lmdb", "redis"])
def opened(request):
    """Return what opens a store in a directory, the same one again if it is open there already."""
    if request.param == "lmdb":
        return lambda directory, bound=50: LmdbHistoryStore(directory / "view", Snapshot(), bound, map_bytes=2**26)
    server: RedisServer = request.getfixturevalue("server")

    def fresh(directory: Path, bound: int = 50) -> RedisHistoryStore:
        store = RedisHistoryStore(server.url, Snapshot(), bound)
        if not (directory / "used").exists():
            store._client.flushall()
            (directory / "used").touch()
        return store

    return fresh


def rows(found: Events | None) -> list[tuple[int, int, int]]:
    return (
        [] if found is None else list(zip(found.time.tolist(), found.item.tolist(), found.action.tolist(), strict=True))
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.sampled_from(USERS), st.lists(st.integers(-5, 40), max_size=9)),
        st.tuples(st.just("forget"), st.sampled_from(USERS), st.just([])),
        st.tuples(st.sampled_from(["follow", "rebuild", "learn", "reopen"]), st.just(""), st.just([])),
    ),
    max_size=25,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, bound=st.integers(1, 30), batch=st.sampled_from([1, 3, 1_000]))
def test_a_view_is_the_snapshot_and_the_newest_events_after_the_last_tombstone(opened, steps, bound, batch):
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        patched.setattr(view, "APPLY_EVENTS", batch)
        directory = Path(name)
        log, store = SegmentLog(directory / "log", "os"), opened(directory, bound)
        expected: dict[str, list[tuple[int, int]]] = {}
        hidden, known, number = False, KNOWN, 0
        for step, user, times in steps:
            if step == "post":
                log.append([Event("", user, str(number + n), time, "xy"[: time % 3]) for n, time in enumerate(times)])
                if times:
                    told = [(time, number + n) for n, time in enumerate(times)]
                    expected[user] = sorted(expected.get(user, []) + told, key=lambda event: event[0])
                number += len(times)
            elif step == "forget":
                log.forget(user)
                expected.pop(user, None)
                hidden |= user == "snapshot"
            elif step == "learn":
                store.learn(log, encoder(known := ALL))
            elif step == "reopen":
                store.close()
                log.close()
                log, store = SegmentLog(directory / "log", "os"), opened(directory, bound)
            else:
                getattr(store, step)(log, encoder(known))
        store.learn(log, encoder(ALL))
        assert store.position == log.end
        assert store.unknown_events == 0
        for user in USERS:
            kept = [(time, item, time % 3) for time, item in expected.get(user, [])[-bound:]]
            base = [(0, 0, 0), (10, 1, 0), (20, 2, 0)] if user == "snapshot" and not hidden else []
            assert rows(store.read(user)) == sorted(base + kept, key=lambda event: event[0])
            assert (store.read(user) is None) == (not base and not kept)
        assert set(store.users(10)) == set(expected) | ({"snapshot"} - {"snapshot" if hidden else ""})
        store.close()
        log.close()


def test_unknown_items_are_counted_until_a_bundle_knows_them_or_they_are_forgotten(opened, tmp_path):
    log, store = SegmentLog(tmp_path / "log", "os"), opened(tmp_path)
    log.append([Event("", user, str(item), item) for user in ("a", "b") for item in (1, 500, 500, 999)])
    store.follow(log, encoder(KNOWN))
    assert (store.unknown_events, store.read("a").item.tolist()) == (6, [1, *[UNKNOWN_KEY] * 3])
    log.forget("b")
    store.learn(log, encoder(600))
    assert (store.unknown_events, store.read("a").item.tolist()) == (1, [1, 500, 500, UNKNOWN_KEY])
    store.close()


def test_what_a_snapshot_contains_is_not_counted_twice(opened, tmp_path, monkeypatch):
    log = SegmentLog(tmp_path / "log", "os")
    log.append([Event("", "snapshot", str(number), number * 10) for number in range(5)])
    ends = [0, *(record.end for record in log.replay())]
    monkeypatch.setattr(Snapshot, "marks", {log.id: LogMark(log.id, ends[3], ())})
    store = opened(tmp_path)
    store.follow(log, encoder(ALL))
    assert store.read("snapshot").time.tolist() == [0, 10, 20, 30, 40]
    store.rebuild(log, encoder(ALL))
    assert store.observe("snapshot")[1:] == (log.end, "snapshot")
    assert store.read("snapshot").time.tolist() == [0, 10, 20, 30, 40]
    store.close()


# --- Redis alone


def test_two_machines_share_a_view_and_their_tombstones(server, tmp_path):
    logs = [SegmentLog(tmp_path / name, "os") for name in ("one", "two")]
    stores = [RedisHistoryStore(server.url, Snapshot()) for _ in logs]
    stores[0]._client.flushall()

    def post(machine: int, time: int) -> None:
        stores[machine].before_append(logs[machine])
        logs[machine].append([Event("", "u", str(time), time)])
        stores[machine].follow(logs[machine], encoder(ALL))

    post(0, 1)
    post(1, 2)
    assert [store.read("u").time.tolist() for store in stores] == [[1, 2], [1, 2]]
    assert stores[0].observe("u").position == -1  # of which log it would be, nothing says
    logs[0].forget("u")
    stores[0].follow(logs[0], encoder(ALL))
    assert stores[1].read("u") is None
    post(0, 3)
    post(1, 4)
    assert stores[1].read("u").time.tolist() == [3, 4]
    for first, second in ((0, 1), (1, 0)):  # Redis lost everything: each log is whole by itself
        stores[first].rebuild(logs[first], encoder(ALL))
        stores[second].follow(logs[second], encoder(ALL))
        assert stores[first].read("u").time.tolist() == [3, 4]


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("more", [0, 1, 5])
def test_a_log_that_lost_its_end_fills_the_view_anew(server, tmp_path, lost, more):
    """As after a power cut with `durability = "os"`, or a log from a backup."""
    log, store = SegmentLog(tmp_path / "log", "os"), RedisHistoryStore(server.url, Snapshot())
    store._client.flushall()
    log.append([Event(str(number), "u", str(number), number) for number in range(4)])
    ends = [0, *(record.end for record in log.replay())]
    store.follow(log, encoder(ALL))
    log.close()
    [path] = (tmp_path / "log").glob("*.jsonl")
    path.write_bytes(path.read_bytes()[: ends[-1 - lost]])
    log = SegmentLog(tmp_path / "log", "os")
    log.append([Event("", "u", str(100 + number), 100 + number) for number in range(more)])
    for _ in range(2):
        store.follow(log, encoder(ALL))
        assert store.read("u").time.tolist() == [*range(4 - lost), *range(100, 100 + more)]
        assert store.position == log.end
    store.close()
    log.close()


def test_who_is_forgotten_is_gone_from_views_of_earlier_snapshots_and_after_a_flush(server, tmp_path, monkeypatch):
    logs = [SegmentLog(tmp_path / name, "os") for name in ("one", "two")]
    old = RedisHistoryStore(server.url, Snapshot())
    old._client.flushall()
    monkeypatch.setattr(Snapshot, "id", "newer")
    stores = [RedisHistoryStore(server.url, Snapshot()) for _ in logs]

    def post(machine: int, time: int) -> None:
        stores[machine].before_append(logs[machine])
        logs[machine].append([Event("", "bob", str(time), time)])
        stores[machine].follow(logs[machine], encoder(ALL))

    post(0, 1)
    old.follow(logs[0], encoder(ALL))
    post(1, 2)
    logs[0].forget("bob")
    stores[0].follow(logs[0], encoder(ALL))
    assert [store.read("bob") for store in (old, *stores)] == [None] * 3
    assert not list(old._client.scan_iter("*u:bob"))
    old._client.flushall()  # before the other machine has heard of it
    logs[0].append([Event("", "carl", "1", 1)])
    stores[0].follow(logs[0], encoder(ALL))
    stores[1].before_append(logs[1])
    logs[1].append([Event("", "carl", "2", 2)])
    stores[1].follow(logs[1], encoder(ALL))
    assert [store.read("bob") for store in stores] == [None] * 2
    assert stores[0].read("carl").time.tolist() == [1, 2]


def test_who_comes_back_stays_when_another_view_hears_of_the_tombstone_later(server, tmp_path, monkeypatch):
    logs = [SegmentLog(tmp_path / name, "os") for name in ("one", "two")]
    older = RedisHistoryStore(server.url, Snapshot())
    older._client.flushall()
    monkeypatch.setattr(Snapshot, "id", "newer")
    newer = RedisHistoryStore(server.url, Snapshot())
    logs[0].append([Event("", "bob", "1", 1)])
    newer.follow(logs[0], encoder(ALL))
    logs[0].forget("bob")
    logs[0].append([Event("", "bob", "5", 5)])
    newer.follow(logs[0], encoder(ALL))
    older.before_append(logs[1])
    logs[1].append([Event("", "carl", "2", 2)])
    older.follow(logs[1], encoder(ALL))
    assert newer.read("bob").time.tolist() == [5]


def test_a_damaged_log_costs_no_machine_its_view(server, tmp_path):
    logs = [SegmentLog(tmp_path / name, "os") for name in ("one", "two")]
    store = RedisHistoryStore(server.url, Snapshot())
    store._client.flushall()
    for log, user in zip(logs, ("u", "v"), strict=True):
        log.append([Event("", user, "1", 1)])
        store.follow(log, encoder(ALL))
    logs[0].append([Event("", "u", "2", 2)])
    logs[0].append([Event("", "u", "3", 3)])
    [path] = (tmp_path / "one").glob("*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"time":2', b'"time":7'))
    for _ in range(2):
        with pytest.raises(DataError):
            store.follow(logs[0], encoder(ALL))
        assert [store.read(user).time.tolist() for user in ("u", "v")] == [[1], [1]]
    path.write_bytes(whole)
    store.follow(logs[0], encoder(ALL))
    assert store.read("u").time.tolist() == [1, 2, 3]


def test_views_nobody_fills_any_more_are_removed(server, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.redis_store.KEPT_SECONDS", -1)
    log, old = SegmentLog(tmp_path / "log", "os"), RedisHistoryStore(server.url, Snapshot())
    old._client.flushall()
    log.append([Event("", "u", "1", 1)])
    log.forget("snapshot")
    old.follow(log, encoder(ALL))
    monkeypatch.setattr(Snapshot, "id", "newer")
    store = RedisHistoryStore(server.url, Snapshot())
    store.follow(log, encoder(ALL))
    assert store.read("u").time.tolist() == [1]
    left = {key.decode() for key in store._client.scan_iter("recsys:snapshot:*")}
    assert left == {"recsys:snapshot:forgotten", "recsys:snapshot:applied"}  # a machine over it goes on hiding them
    with pytest.raises(StoreError, match="lost its view"):  # so a service fills it again
        old.read("snapshot")
    old.follow(log, encoder(ALL))
    assert (old.read("u").time.tolist(), old.read("snapshot")) == ([1], None)


def test_a_server_that_evicts_is_refused(server):
    client = redis.Redis.from_url(server.url)
    client.config_set("maxmemory", "100mb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match=r"maxmemory-policy is allkeys-lru.*noeviction"):
            RedisHistoryStore(server.url, Snapshot())
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 0)
    RedisHistoryStore(server.url, Snapshot()).close()


def test_a_server_that_is_gone_is_told_and_one_that_comes_back_empty_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.redis_store.PAUSE_SECONDS", 0.0)
    with redis_server(tmp_path) as server:
        log, store = SegmentLog(tmp_path / "log", "os"), RedisHistoryStore(server.url, Snapshot())
        log.append([Event("", "u", "1", 1)])
        store.follow(log, encoder(ALL))
        server.stop()
        log.append([Event("", "u", "2", 2)])
        for ask in (lambda: store.read("u"), lambda: store.follow(log, encoder(ALL)), lambda: store.position):
            with pytest.raises(StoreError, match="redis history store"):
                ask()
        server.start()
        log.append([Event("", "u", "3", 3)])
        store.follow(log, encoder(ALL))
        assert store.read("u").time.tolist() == [1, 2, 3]
        store.close()


def test_a_service_over_redis_answers_without_it_and_with_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.redis_store.PAUSE_SECONDS", 0.0)
    place = publish_world(tmp_path / "world")
    with redis_server(tmp_path) as server:
        monkeypatch.setenv("RECSYS_REDIS_URL", server.url)
        service = make_service(place, tmp_path / "state", history_store="redis")
        event = {"user_id": "u", "item_id": "item-1"}
        with TestClient(patient_app(service)) as client:

            def ask(path: str, **body) -> dict:
                return client.post(f"/v1/{path}", json=body).json()

            ask("events", events=[event])
            before = ask("recommend", user_id="user-1", at=LATER)
            assert (before["degraded"], ask("recommend", user_id="u")["history_events"]) == ([], 1)
            server.stop()
            assert ask("events", events=[event])["accepted"] == 1
            without = ask("recommend", user_id="user-1", at=LATER)
            assert (without["degraded"], without["user_known"], len(without["items"])) == (["history"], False, 10)
            inline = [{"item_id": "item-1", "timestamp": 1}]
            assert ask("rank", history=inline, item_ids=["item-2"])["degraded"] == []
            assert client.delete("/v1/users/u").status_code == 503
            assert client.get("/v1/models").json()["history_store"]["available"] is False
            server.start()
            ask("events", events=[event])
            assert ask("recommend", user_id="u")["history_events"] == 3
            assert ask("recommend", user_id="user-1", at=LATER)["items"] == before["items"]
        service.close()


def test_who_was_forgotten_does_not_come_back_with_an_empty_redis(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.redis_store.PAUSE_SECONDS", 0.0)
    place = publish_world(tmp_path / "world")
    with redis_server(tmp_path) as server:
        monkeypatch.setenv("RECSYS_REDIS_URL", server.url)
        service = make_service(place, tmp_path / "state", history_store="redis")
        with TestClient(patient_app(service)) as client:
            client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "item-1"}]})
            assert client.delete("/v1/users/user-1").json()["snapshot_events"] > 0
            redis.Redis.from_url(server.url).flushall()
            empty = client.post("/v1/recommend", json={"user_id": "user-1", "at": LATER}).json()
            assert (empty["degraded"], empty["user_known"]) == (["history"], False)
            filled = client.post("/v1/recommend", json={"user_id": "u"}).json()
            assert (filled["degraded"], filled["history_events"]) == ([], 1)
            for ask in ("/v1/users/user-1/history", "/v1/users/u/history", "/v1/users?limit=1000"):
                redis.Redis.from_url(server.url).flushall()
                assert client.get(ask).status_code == 503
                assert client.get(ask).status_code == (404 if "user-1" in ask else 200)
            assert "user-1" not in client.get("/v1/users?limit=1000").json()["users"]
        service.close()


def test_a_store_without_its_url_is_a_setting_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("RECSYS_REDIS_URL", raising=False)
    with pytest.raises(ConfigError, match="RECSYS_REDIS_URL"):
        ServeConfig(tmp_path, tmp_path, tmp_path, history_store="redis")
    config = ServeConfig(tmp_path, tmp_path, tmp_path, history_store="redis", redis_url="redis://:secret@host")
    assert "secret" not in repr(config)


def test_what_is_applied_while_a_history_is_read_does_not_tear_it(server, tmp_path, monkeypatch):
    """Redis may let another process's script in between the commands of a read."""
    log, store = SegmentLog(tmp_path / "log", "os"), RedisHistoryStore(server.url, Snapshot())
    store._client.flushall()
    log.append([Event("", "snapshot", "1", 50)])
    store.follow(log, encoder(ALL))
    at_once, reads = store._at_once, []

    def let_in(user_id, transaction):
        reads.append(transaction)
        first = at_once(user_id, transaction)
        if transaction:
            return first
        log.forget("snapshot")
        log.append([Event("", "snapshot", "2", 60)])
        store.follow(log, encoder(ALL))
        return first[:2] + at_once(user_id, transaction)[2:]

    monkeypatch.setattr(store, "_at_once", let_in)
    seen = store.observe("snapshot")
    assert reads == [False, True]
    assert (rows(seen.events), seen.position) == ([(60, 2, 0)], log.end)
    store.close()
    log.close()
