"""The recall of a served index is told from a sample of its searches, beside the requests and never in their way."""

import queue
import threading

import numpy as np
import pytest
from serving_world import LATER, make_service, publish_world, sample
from starlette.testclient import TestClient

from ranking.index import IndexConfig, build
from ranking.recall_watch import RecallWatch
from ranking.sources import Retrieval, SourceQuery
from serving.app import create_app

SOON = 60.0
"""seconds within which a thread has had its turn"""
ROWS = np.arange(2, 2_002)


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).normal(size=(2_000, 16)).astype(np.float32)


def rough(vectors):
    """An index that reads one list of forty, and so finds little."""
    return build(vectors, ROWS, IndexConfig(exact_below=0, lists=40, probes=1))


def query(vector, allowed=None):
    nobody = np.empty(0, np.int64)
    return SourceQuery(nobody.astype(np.int32), nobody, 0, vector[None], allowed)


class Told(queue.SimpleQueue):
    """What a watch tells."""

    def next(self) -> float:
        return self.get(timeout=SOON)


@pytest.mark.parametrize("filtered", [False, True])
def test_the_mean_recall_of_the_searches_is_told(vectors, filtered):
    index, told = rough(vectors), Told()
    allowed = np.random.default_rng(1).random(2_002) < 0.5 if filtered else None
    watch = RecallWatch(1.0, told.put, rest=0.0)
    watch.follow(index)
    source, shares = Retrieval(index, watch), []
    for vector in np.random.default_rng(2).normal(size=(20, 16)).astype(np.float32):
        found = source.propose(query(vector, allowed), 10).rows
        scores = vectors @ vector
        best = sorted((row for row in ROWS if allowed is None or allowed[row]), key=lambda row: -scores[row - 2])[:10]
        shares.append(len(set(found) & set(best)) / 10)
        assert told.next() == pytest.approx(np.mean(shares))
    assert np.mean(shares) < 0.9
    watch.close()


def test_one_index_is_watched_and_a_new_one_begins_anew(vectors):
    bad, good, told = rough(vectors), build(vectors, ROWS), Told()
    watch = RecallWatch(1.0, told.put, rest=0.0)
    watch.follow(bad)
    Retrieval(good, watch).propose(query(vectors[0]), 10)  # a challenger's
    Retrieval(bad, watch).propose(query(vectors[0]), 10)
    assert told.next() < 1
    watch.follow(good)
    Retrieval(bad, watch).propose(query(vectors[0]), 10)  # of a request that began before the swap
    Retrieval(good, watch).propose(query(vectors[0]), 10)
    assert told.next() == 1
    watch.close()
    assert told.empty()


def test_a_share_is_drawn(vectors):
    index, told = build(vectors, ROWS), Told()
    watch = RecallWatch(0.0, told.put, rest=0.0)
    watch.follow(index)
    Retrieval(index, watch).propose(query(vectors[0]), 10)
    watch.close()
    assert told.empty()


def test_a_service_tells_it_and_answers_while_it_is_measured(tmp_path, monkeypatch):
    service = make_service(publish_world(tmp_path / "world"), tmp_path / "state", recall_share=1.0)
    index = service.served.bundle.index
    exact, begun, go = index.exact, threading.Event(), threading.Event()

    def waiting(*search):
        begun.set()
        assert go.wait(SOON)
        return exact(*search)

    monkeypatch.setattr(index, "exact", waiting)
    with TestClient(create_app(service)) as client:

        def ask():
            client.post("/v1/recommend", json={"user_id": "user-1", "at": LATER}).raise_for_status()

        assert sample(client.get("/metrics").text, "recsys_index_recall") == 1  # as at publish
        ask()
        assert begun.wait(SOON)
        for _ in range(5):  # one waits for its turn, and the others are let go
            ask()
        assert sample(client.get("/metrics").text, "recsys_index_recall_searches_total") == 0
        go.set()
        while sample(client.get("/metrics").text, "recsys_index_recall_searches_total") == 0:
            pass
        assert sample(client.get("/metrics").text, "recsys_index_recall") == 1
    service.close()
