"""What the service says of itself: parity with publish, drift of scores, ages and ratios."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_world import LATER, eventually, patient_app, sample
from starlette.testclient import TestClient

from ranking.drift import LEAST, Drift, ScoreReference, stability
from ranking.golden import TOLERANCE
from serving.monitor import Monitor
from serving.worker import Worker

# --- drift


def test_the_same_scores_have_no_drift_and_shifted_ones_have():
    scores = np.random.default_rng(0).normal(size=4_000)
    reference = ScoreReference.of(scores[:2_000])
    assert len(reference.shares) == 10
    assert stability(reference, scores[2_000:]) < 0.02
    assert stability(reference, scores[2_000:] + 1) > 0.25


def test_the_index_by_hand():
    reference = ScoreReference(edges=[0.0], shares=[0.5, 0.5], scores=10**9)
    live = np.array([-1.0] * 200 + [1.0] * 800)
    p = np.array([200.5, 800.5]) / 1001
    assert stability(reference, live) == pytest.approx(np.sum((p - 0.5) * np.log(p / 0.5)), rel=1e-6)


def test_a_score_on_an_edge_belongs_above_it():
    """Scores of counts are few and lie on the edges: the reference and what is compared with it part them alike."""
    reference = ScoreReference(edges=[0.0, 1.0], shares=[0.25, 0.5, 0.25], scores=10**9)
    live = np.repeat([-1.0, 0.0, 1.0], [250, 500, 250])
    assert stability(reference, live) == pytest.approx(0, abs=1e-4)
    assert ScoreReference.of(np.repeat([0.0, 1.0], 500)).shares[-1] == pytest.approx(0.5)


@given(st.lists(st.floats(-1e9, 1e9), max_size=50), st.lists(st.floats(-1e9, 1e9), max_size=50))
def test_any_scores_have_a_finite_index_that_is_not_negative(old, new):
    index = stability(ScoreReference.of(np.array(old)), np.array(new))
    assert np.isfinite(index)
    assert index >= -1e-12


def test_few_scores_say_nothing():
    drift = Drift(ScoreReference.of(np.arange(100.0)))
    drift.add(np.arange(LEAST - 1.0))
    assert drift.value() is None
    drift.add([1.0])
    assert drift.value() is not None


# --- golden requests


def test_a_sound_bundle_is_as_published_and_another_weight_is_told(service):
    monitor, served = Monitor(service, Worker(4), 60), service.served
    for _ in range(4):
        asyncio.run(monitor.check())
        assert sample(service.telemetry.scrape().decode(), "recsys_golden_parity_error") <= TOLERANCE
    golden = served.bundle.golden
    moved = [
        user.model_copy(update={"scores": [score + 0.01 for score in user.scores]}) for user in golden.users
    ]  # as if published by other code
    other = dataclasses.replace(served.bundle, golden=golden.model_copy(update={"users": moved}))
    service.swap(dataclasses.replace(served, bundle=other))
    asyncio.run(monitor.check())
    service.swap(served)
    assert sample(service.telemetry.scrape().decode(), "recsys_golden_parity_error") > 1e-3


def test_a_check_takes_no_place_of_those_who_wait(service):
    async def both() -> None:
        worker, go = Worker(1), threading.Event()
        request = asyncio.create_task(worker.run(go.wait))
        await asyncio.sleep(0)  # the only place is taken
        check = asyncio.create_task(Monitor(service, worker, 60).check())
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(request, check)
        check = asyncio.create_task(worker.run_uncounted(lambda: None))
        await asyncio.sleep(0)
        assert worker.waiting == 0
        await asyncio.gather(check, worker.run(lambda: None))

    asyncio.run(both())


def test_a_service_checks_itself_and_counts_what_it_gives(service):
    reference = ScoreReference(edges=[1e8], shares=[0.5, 0.5], scores=100)
    service.swap(
        dataclasses.replace(service.served, bundle=dataclasses.replace(service.served.bundle, reference=reference))
    )
    with TestClient(patient_app(service, check_seconds=0.02)) as client:
        for number in range(60):
            user = {"user_id": f"user-{number % 20}", "k": 10, "at": LATER}
            client.post("/v1/recommend", json=user).raise_for_status()
        client.post("/v1/recommend", json={"user_id": "user-1", "k": 1000}).raise_for_status()
        client.post("/v1/events", json={"events": [{"user_id": "u", "item_id": "item-1"}]}).raise_for_status()
        assert eventually(lambda: sample(client.get("/metrics").text, "recsys_score_drift") != 0)
        text = client.get("/metrics").text
    assert sample(text, "recsys_score_drift") > 0.25  # all scores lie in one of two bins
    assert sample(text, "recsys_golden_checks_total") >= 1
    assert sample(text, "recsys_bundle_created_seconds") == 1_767_225_600  # 2026-01-01
    assert sample(text, "recsys_items_given_total") < sample(text, "recsys_items_asked_total")
    assert sample(text, "recsys_event_effect_seconds_count") == 1
    assert sample(text, "recsys_recommend_candidates_count") == 61
