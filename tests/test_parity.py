"""The offline batch job and the live endpoint agree on the same requests, before and after posted events.

For every score |a - b| <= 1e-6 max(1, |a|), and the items are the same in the same order.
"""

from collections.abc import Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest
from serving_world import free_port

from pipelines.recommend import BatchRequest, recommend_users
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.snapshot import SnapshotReader
from recsys.messages import RankRequest
from recsys.randomness import generator
from recsys.stores import Encoder
from serving.event_log import SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.host import ServeConfig, start

pytestmark = [pytest.mark.slow, pytest.mark.serve]

HOUR = 3_600_000_000
K = 20


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def client(published, state: Path) -> Iterator[httpx.Client]:
    config = ServeConfig(published.bundle, published.snapshot, state, port=free_port())
    with start(config) as running, httpx.Client(base_url=running.address, timeout=60) as client:
        yield client


def close(offline: float, online: float) -> bool:
    return abs(offline - online) <= 1e-6 * max(1.0, abs(offline))


def assert_agreement(client: httpx.Client, bundle: Bundle, histories, users: list[str], at: int, tmp: Path) -> None:
    """Compare both paths over recommend and rank for these users at this moment."""
    draws = generator(7, at % 2**31, "parity")
    known = bundle.item_ids[2:]
    wanted = [[known[i] for i in draws.integers(0, len(known), 50)] + ["no such item"] for _ in users]
    recommend_users(bundle, histories, users, BatchRequest(K, at), tmp / "recommend.parquet")
    recommender = Recommender(bundle, histories)
    listed = pl.read_parquet(tmp / "recommend.parquet").partition_by("user_id", as_dict=True)
    for user, items in zip(users, wanted, strict=True):
        online = client.post("/v1/recommend", json={"user_id": user, "k": K, "at": at}).raise_for_status().json()
        offline = listed[(user,)].sort("rank")
        assert [item["item_id"] for item in online["items"]] == offline["item_id"].to_list()
        for item, score in zip(online["items"], offline["score"], strict=True):
            assert close(score, item["score"])
        online = client.post("/v1/rank", json={"user_id": user, "item_ids": items, "at": at}).raise_for_status().json()
        scored = recommender.rank(RankRequest(user_id=user, item_ids=items, at=at), at)
        for mine, theirs in zip(scored.scores, online["scores"], strict=True):
            assert (mine is None and theirs is None) or close(mine, theirs)
        assert online["scores"][-1] is None
        assert online["unknown_item_ids"] == ["no such item"]


def test_offline_and_online_agree_before_and_after_posted_events(client, published, state, tmp_path):
    bundle = Bundle.load(published.bundle)
    snapshot = SnapshotReader(published.snapshot)
    users = [*snapshot.users(25), "a user nobody knows"]
    newest = max(int(events.time[-1]) for user in users if (events := snapshot.read(user)) is not None)
    for at in (newest + HOUR, newest - 60 * 24 * HOUR):  # after everything, and a moment two months back
        assert_agreement(client, bundle, snapshot, users, at, tmp_path)

    draws = generator(11, 0, "events")
    known = bundle.item_ids[2:]
    posted = [
        {
            "user_id": user,
            "item_id": "new here" if draws.random() < 0.1 else known[int(draws.integers(len(known)))],
            "timestamp": newest - int(draws.integers(0, 40 * 24)) * HOUR,  # late ones among them
            "action": "purchase",
            "event_id": f"{user}/{number}",
        }
        for user in users
        for number in range(4)
    ]
    before = client.post("/v1/recommend", json={"user_id": users[-1], "at": newest + HOUR}).json()
    verdicts = client.post("/v1/events", json={"events": posted}).raise_for_status().json()
    assert verdicts["accepted"] == len(posted)
    again = client.post("/v1/events", json={"events": posted}).raise_for_status().json()
    assert {entry["verdict"] for entry in again["verdicts"]} == {"duplicate"}
    after = client.post("/v1/recommend", json={"user_id": users[-1], "at": newest + HOUR}).json()
    assert (before["user_known"], after["user_known"]) == (False, True)
    assert after["history_events"] == 4

    # The offline side rebuilds the histories from snapshot and log, not from what the service keeps.
    log = SegmentLog(state / "log")
    rebuilt = LmdbHistoryStore(tmp_path / "rebuilt", snapshot)
    rebuilt.follow(log, Encoder(bundle.key_of, bundle.action_of))
    for at in (newest + HOUR, newest - 20 * 24 * HOUR):
        assert_agreement(client, bundle, rebuilt, users, at, tmp_path)
    rebuilt.close()
    log.close()
