"""Impressions as requests: against plain loops, part by part, and the probabilities measured on them."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import Line, random_log, synthetic
from shown_world import CONFIG, EVALUATE, ingested
from sklearn.metrics import log_loss

from pipelines.append import append
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.prepare import prepare
from pipelines.prepared import IMPRESSIONS, PreparedSet
from pipelines.shipped import find_config
from recsys.bootstrap import CalibrationError
from recsys.config import parse, read_toml
from recsys.errors import ConfigError, DataError
from recsys.files import write_json
from recsys.history import DAY
from worlds import Fake


def shown(seed: int, users: list[str], answers: int) -> list[tuple[str, str, str, int, int]]:
    """Answers of one to four items, some of users and items that the log lacks, some items twice."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(answers):
        user, at = [*users, "nobody"][draw.integers(len(users) + 1)], int(draw.integers(90 * 2)) * DAY // 2
        items = draw.integers(0, 13, draw.integers(1, 5))
        rows += [(f"r{number % 7}", user, f"i{item}", at, int(draw.random() < 0.4)) for item in items]
    return rows


def reference(lines, rows, known_items):
    """Return {(user, request id): (moment, events before, {item: taken})} of the test period."""
    cut = max(line.time for line in lines) + 1 - 30 * DAY
    answers = defaultdict(list)
    for request, user, item, at, label in rows:
        if any(line.user == user for line in lines) and item in known_items:
            answers[user, request].append((at, item, label))
    found = {}
    for (user, request), some in answers.items():
        at = min(moment for moment, _, _ in some)
        if at >= cut:
            items = defaultdict(int)
            for _, item, label in some:
                items[item] = max(items[item], label)
            found[user, request] = (at, sum(line.user == user and line.time < at for line in lines), dict(items))
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), users=st.integers(1, 8), answers=st.integers(0, 40))
def test_an_answer_is_a_request_with_what_was_shown_and_taken(seed, users, answers):
    lines = [*random_log(seed, users, 30, False), Line("a", "i1", -9 * DAY, None, "buy")]
    rows = shown(seed, sorted({line.user for line in lines}), answers)
    with TemporaryDirectory() as name:
        done = prepare(ingested(lines, rows, Path(name) / "part"), Path(name) / "set", CONFIG)
        expected = reference(lines, rows, set(done.catalogue["item_id"]))
        if not expected:
            with pytest.raises(DataError, match="no impressions"):
                done.requests(IMPRESSIONS)
            return
        requests, sets = done.requests(IMPRESSIONS), done.candidates(IMPRESSIONS, IMPRESSIONS)
        ids, names = done.catalogue["item_id"].to_list(), done.users["user_id"].to_list()
        found = []
        for index in range(len(requests)):
            here = slice(sets.offsets[index], sets.offsets[index + 1])
            row, label = sets.item[here], sets.label[here]
            taken = requests.positive[requests.offsets[index] : requests.offsets[index + 1]]
            assert taken.tolist() == row[label == 1].tolist() == sorted(set(taken.tolist()))
            assert (np.diff(label.astype(int)) <= 0).all()
            user, at = int(requests.user[index]), int(requests.at[index])
            before = int(requests.end[index] - done.histories.offsets[user])
            items = {ids[one - 2]: int(yes) for one, yes in zip(row, label, strict=True)}
            found.append((names[user], at, before, sorted(items.items())))
        assert sorted(found) == sorted((u, at, n, sorted(items.items())) for (u, _), (at, n, items) in expected.items())
        moments = list(zip(requests.at, requests.user, strict=True))
        assert moments == sorted(moments)
        assert done.manifest["counts"][IMPRESSIONS]["taken"] == len(requests.positive)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two parts of a log, the second one later, each with its impressions."""
    folder = tmp_path_factory.mktemp("parts")
    lines = sorted(synthetic(2_000), key=lambda line: line.time)
    first, second = lines[:1_700], [line for line in lines[1_700:] if line.time > lines[1_699].time]
    users = sorted({line.user for line in lines})
    rows = [(f"{n}-{r}", u, i, at + 110 * DAY, y) for n in (1, 2) for r, u, i, at, y in shown(n, users, 500)]
    half = len(rows) // 2
    return [ingested(first, rows[:half], folder / "1"), ingested(second, rows[half:], folder / "2")]


def test_parts_one_by_one_are_the_parts_at_once(parts, tmp_path):
    at_once = prepare(parts, tmp_path / "at once", replace(CONFIG, max_eval_requests=50))
    prepare(parts[0], tmp_path / "first", replace(CONFIG, max_eval_requests=50))
    one_by_one = append(parts[1], tmp_path / "first", tmp_path / "both")
    assert at_once.digest == one_by_one.digest
    assert at_once.manifest == one_by_one.manifest
    assert len(at_once.requests(IMPRESSIONS)) == len(at_once.candidates(IMPRESSIONS, IMPRESSIONS)) == 50


def test_users_who_are_forgotten_have_no_impressions(parts, tmp_path):
    before = prepare(parts, tmp_path / "before", CONFIG)
    user = before.users["user_id"][int(np.bincount(before.requests(IMPRESSIONS).user).argmax())]
    write_json(parts[0] / "forgotten.json", [user])
    try:
        after = prepare(parts, tmp_path / "after", CONFIG)
    finally:
        (parts[0] / "forgotten.json").unlink()

    def answers(prepared: PreparedSet) -> int:
        named = prepared.users["user_id"].to_numpy()[prepared.requests(IMPRESSIONS).user]
        return int((named == user).sum())

    assert 0 < answers(after) < answers(before)  # in the second part a life begins anew


def test_log_loss_and_calibration_of_what_was_shown(parts, tmp_path):
    prepared = prepare(parts, tmp_path / "set", CONFIG)
    sets = prepared.candidates(IMPRESSIONS, IMPRESSIONS)
    logit = np.linspace(-3, 2, len(prepared.items)).astype(np.float32)
    rate = float(sets.label.mean())
    models = {
        "some": Fake(prepared.items, lambda history, at, item: logit[item]),
        "rate": Fake(prepared.items, lambda history, at, item: np.full(len(item), np.log(rate / (1 - rate)))),
    }
    found = evaluate(models, prepared, EVALUATE)
    probability = 1 / (1 + np.exp(-logit[sets.item].astype(np.float64)))
    assert found.metric("some", IMPRESSIONS, "logloss") == pytest.approx(log_loss(sets.label, probability))
    assert found.metric("rate", IMPRESSIONS, "ece") == pytest.approx(0, abs=1e-6)
    assert found.metric("rate", IMPRESSIONS, "auc") == pytest.approx(0.5)
    low, high = found.interval("some", IMPRESSIONS, "ece") or (1, 0)
    assert 0 < low <= high
    assert found.candidates[IMPRESSIONS].candidates == len(sets.item)


@given(seed=st.integers(0, 2**32), size=st.integers(0, 60))
def test_the_calibration_error_of_a_resample_is_that_of_its_rows(seed, size):
    draw = np.random.default_rng(seed)
    probability, label, user = draw.random(size).round(1), draw.random(size) < 0.5, draw.integers(0, 4, size)
    weights = draw.integers(0, 3, (3, 4)).astype(np.int32)
    found = CalibrationError.build(probability, label, user, 4, bins=5).of(weights)
    edges = sorted({float(np.sort(probability)[size * n // 5]) for n in range(1, 5) if size})
    for weight, value in zip(weights, found, strict=True):
        times = weight[user]
        bins = [sum(one >= edge for edge in edges) for one in probability]
        gaps = [
            sum(t * (p - y) for t, p, y, b in zip(times, probability, label, bins, strict=True) if b == k)
            for k in range(5)
        ]
        expected = sum(map(abs, gaps)) / times.sum() if times.sum() else np.nan
        assert value == pytest.approx(expected, nan_ok=True)


def test_what_was_shown_goes_with_its_split_only():
    path = find_config("evaluate_impressions")
    assert parse(EvaluateConfig, read_toml(path, ()), str(path)) == EvaluateConfig(
        split=IMPRESSIONS, samplers=(IMPRESSIONS,)
    )
    for wrong in ({"split": "test"}, {"samplers": ("uniform",)}, {"samplers": (IMPRESSIONS, "uniform")}):
        with pytest.raises(ConfigError, match="only candidates of its split"):
            replace(EVALUATE, **wrong)
