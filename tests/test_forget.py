"""A user who is forgotten is gone from every answer, over restarts, rebuilds and new bundles, and nobody else is."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_world import LATER, USERS, make_service, patient_app, publish_world
from starlette.testclient import TestClient

from recsys.history import Events
from recsys.stores import Encoder, Event, LogMark
from serving.event_log import SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.settings import load_into

NAMES = ("a", "ab", "b", "snapshot", "snapshot 2")
ENCODER = Encoder(int, lambda action: 0)


class Snapshot:
    """Two users with three events each."""

    id = "snapshot"

    def mark(self, log: str) -> LogMark:
        return LogMark(log)

    def read(self, user_id: str) -> Events | None:
        if user_id not in self.users(2):
            return None
        return Events(np.arange(3, dtype=np.uint32), np.zeros(3, np.uint8), np.arange(3, dtype=np.int64))

    def users(self, limit: int) -> list[str]:
        return ["snapshot", "snapshot 2"][:limit]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("post"), st.sampled_from(NAMES), st.integers(0, 600)),
        st.tuples(st.just("forget"), st.sampled_from(NAMES), st.just(0)),
        st.tuples(st.sampled_from(["follow", "rebuild", "reopen"]), st.just(""), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_the_view_is_what_was_posted_after_the_last_tombstone(steps):
    expected = {user: [0, 1, 2] for user in Snapshot().users(2)}
    with tempfile.TemporaryDirectory() as name:
        log, store = SegmentLog(Path(name) / "log", "os"), LmdbHistoryStore(Path(name) / "view", Snapshot())
        clock = 10
        for step, user, number in steps:
            if step == "post":
                events = [Event("", user, str(item), clock + item) for item in range(number)]
                log.append(events)
                clock += number
                if events:
                    expected.setdefault(user, []).extend(range(number))
            elif step == "forget":
                log.forget(user)
                expected.pop(user, None)
            elif step == "follow":
                store.follow(log, ENCODER)
            elif step == "rebuild":
                store.rebuild(log, ENCODER)
            else:
                store.close()
                log.close()
                log, store = SegmentLog(Path(name) / "log", "os"), LmdbHistoryStore(Path(name) / "view", Snapshot())
        store.follow(log, ENCODER)
        for user in NAMES:
            found = store.read(user)
            assert (None if found is None else found.item.tolist()) == expected.get(user)
        assert set(store.users(10)) == set(expected)
        store.close()
        log.close()


@pytest.fixture
def place(tmp_path):
    return publish_world(tmp_path)


def test_over_http(place, tmp_path):
    service = make_service(place, tmp_path / "state", place.smaller)
    with TestClient(patient_app(service)) as client:

        def get(path: str):
            return client.get(path).json()

        def recommend(user: str) -> dict:
            answer = client.post("/v1/recommend", json={"user_id": user, "at": LATER}).json()
            return answer | {"timings": 0}

        def post(user: str, item: str, event_id: str) -> str:
            event = {"user_id": user, "item_id": item, "event_id": event_id, "timestamp": LATER - 1}
            return client.post("/v1/events", json={"events": [event]}).json()["verdicts"][0]["verdict"]

        before = get("/v1/users/user-1/history")["total"]
        others = [f"user-{number}" for number in range(USERS) if number != 1]
        kept = [recommend(user) for user in others]
        post("user-1", "item-1", "first")
        post("user-1", "item-61", "unknown to the smaller bundle")
        assert service.store.unknown_events == 1
        found = client.delete("/v1/users/user-1").json()
        assert (found["user_id"], found["snapshot_events"], found["posted_events"]) == ("user-1", before, 2)
        assert found["position"] == service.models().event_log.end
        assert service.store.unknown_events == 0
        stranger = recommend("nobody has this id")
        assert recommend("user-1") == stranger
        assert get("/v1/users/user-1/history")["code"] == "unknown_user"
        assert get("/v1/users?limit=100")["users"] == others
        again = client.delete("/v1/users/user-1").json()  # a repeat, as after an answer that got lost
        assert (again["snapshot_events"], again["posted_events"]) == (0, 0)
        assert client.delete(f"/v1/users/{'x' * 500}").status_code == 422
        assert [recommend(user) for user in others] == kept
        assert post("user-1", "item-1", "first") == "duplicate"  # a late repeat does not bring anything back
        assert recommend("user-1") == stranger
        load_into(service, place.bundle)
        assert not recommend("user-1")["user_known"]
        assert post("user-1", "item-2", "of a new life") == "accepted"
        assert [event["item_id"] for event in get("/v1/users/user-1/history")["events"]] == ["item-2"]
    service.close()
    service = make_service(place, tmp_path / "state")
    with TestClient(patient_app(service)) as client:
        assert client.get("/v1/users/user-1/history").json()["total"] == 1
    service.close()
