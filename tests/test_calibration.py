"""Calibration: monotone to the last bit, better on answers it has not seen, the same in the bundle as offline."""

from dataclasses import replace

import numpy as np
import pytest
from bundle_world import PROVENANCE, contents, named
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import synthetic
from pydantic import ValidationError
from shown_world import CONFIG, EVALUATE, ingested
from typer.testing import CliRunner

from pipelines.calibration import METHODS, fit_calibration, fit_scores
from pipelines.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.prepared import IMPRESSIONS, VALID_IMPRESSIONS
from pipelines.report import build_page, render_html, render_markdown
from pipelines.shipped import find_config
from pipelines.train import train
from pipelines.train_config import load_config
from ranking.bundle import Bundle, write_bundle
from ranking.calibration import Calibration
from ranking.recommender import Recommender
from recsys.cli import app
from recsys.errors import ConfigError, DataError
from recsys.history import DAY
from recsys.messages import InlineEvent, RankRequest, RecommendRequest
from worlds import Fake, Nobody

TRUE_SLOPE, TRUE_INTERCEPT = 0.4, -1.5
"""An item with score x is taken when shown with chance 1 / (1 + exp(1.5 - 0.4 x)): scores claim far too much."""


def chance(score):
    return 1 / (1 + np.exp(-(TRUE_SLOPE * score + TRUE_INTERCEPT)))


def drawn(seed: int, size: int):
    draw = np.random.default_rng(seed)
    score = (3 * draw.standard_normal(size)).astype(np.float32)
    return score, draw.random(size) < chance(score)


def error(probability, score):
    """Return the mean distance from the chance that is known here."""
    return float(np.abs(probability - chance(score.astype(np.float64))).mean())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(400, 800), method=st.sampled_from(METHODS))
def test_a_higher_score_never_has_a_lower_probability(seed, size, method):
    found = fit_scores(method, *drawn(seed, size), answers=size)
    knots = np.array(found.score, np.float32)
    near = np.concatenate([np.nextafter(knots, np.float32(-np.inf)), knots, np.nextafter(knots, np.float32(np.inf))])
    every = np.sort(np.concatenate([np.linspace(-40, 40, 1_001, dtype=np.float32), near, np.float32([-1e9, 1e9])]))
    told = found.of(every)
    assert ((told >= 0) & (told <= 1)).all()
    assert (np.diff(told) >= 0).all()
    assert (np.diff(told.astype(np.float32)) >= 0).all()
    again = Calibration.model_validate_json(found.model_dump_json())
    assert np.array_equal(again.of(every), told)
    assert np.array_equal([again.of(every[place : place + 1])[0] for place in range(0, len(every), 97)], told[::97])


@pytest.mark.parametrize("method", METHODS)
def test_a_map_mends_scores_that_claim_too_much(method):
    found = fit_scores(method, *drawn(1, 20_000), answers=5_000)
    score, _ = drawn(2, 20_000)
    raw = 1 / (1 + np.exp(-score.astype(np.float64)))
    assert error(found.of(score), score) < 0.02 < 0.2 < error(raw, score)
    if method == "platt":
        assert (found.slope, found.intercept) == pytest.approx((TRUE_SLOPE, TRUE_INTERCEPT), abs=0.06)


def test_what_cannot_be_fitted_is_refused():
    score, label = drawn(3, 2_000)
    with pytest.raises(DataError, match="0 items taken and 2000 not taken"):
        fit_scores("platt", score, np.zeros(len(score)), 500)
    with pytest.raises(DataError, match="no more often"):
        fit_scores("platt", -score, label, 500)
    for knots in (
        {"score": [1.0, 1.0], "probability": [0.1, 0.2]},
        {"score": [0.0, 1.0], "probability": [0.2, 0.1]},
        {},
    ):
        with pytest.raises(ValidationError, match="both ascending"):
            Calibration(method="isotonic", answers=1, shown=1, **knots)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A log in which items that are shown are taken with a chance that their number gives."""
    folder, draw = tmp_path_factory.mktemp("shown"), np.random.default_rng(4)
    lines = synthetic(2_000)
    newest, users = max(line.time for line in lines), sorted({line.user for line in lines})
    ids = sorted({line.item for line in lines})
    rows = []
    for number in range(3_000):
        user, at = users[draw.integers(len(users))], newest - int(draw.integers(38 * DAY))
        places = draw.choice(len(ids), 4, replace=False)
        taken = draw.random(4) < chance(scores_of(len(ids))[places])
        rows += [(f"r{number}", user, ids[i], at, int(yes)) for i, yes in zip(places, taken, strict=True)]
    done = prepare(ingested(lines, rows, folder / "part"), folder / "set", CONFIG)
    order = {item: place for place, item in enumerate(ids)}
    by_row = np.zeros(len(done.items), np.float32)
    for key, item in zip(done.key_to_row.tolist(), done.catalogue["item_id"].to_list(), strict=True):
        by_row[key] = scores_of(len(ids))[order[item]] if item in order else 0.0
    return done, Fake(done.items, lambda history, at, item: by_row[item])


def scores_of(items: int):
    return np.linspace(-6, 6, items).astype(np.float32)


def test_the_error_on_what_was_shown_later_falls_and_the_report_shows_it(prepared):
    done, model = prepared
    counts = done.manifest["counts"]
    assert counts[VALID_IMPRESSIONS]["requests"] + counts[IMPRESSIONS]["requests"] > 2_000
    valid, test = done.requests(VALID_IMPRESSIONS), done.requests(IMPRESSIONS)
    assert done.manifest["cuts"]["valid"] <= valid.at.min() <= valid.at.max() < done.manifest["cuts"]["test"]
    assert test.at.min() >= done.manifest["cuts"]["test"]
    found = evaluate({"model": model}, done, EVALUATE)
    told = found.reliability["model"]
    assert told.answers == len(valid)
    before = told.readings["none"]
    for method in METHODS:
        after = told.readings[method]
        assert after.ece[0] < 0.03 < 0.15 < before.ece[0]
        assert after.logloss[0] < before.logloss[0]
        assert sum(one.shown for one in after.bins) == counts[IMPRESSIONS]["shown"]
    assert before.ece[0] == pytest.approx(found.metric("model", IMPRESSIONS, "ece"))
    assert before.logloss[0] == pytest.approx(found.metric("model", IMPRESSIONS, "logloss"))
    page = build_page(found, {}, done.manifest)
    for text in (render_html(page), render_markdown(page)):
        assert "Error, isotonic" in text
        assert f"{told.readings['isotonic'].ece[0]:.4f}" in text
    assert 'id="reliability-model' in render_html(page)


def test_without_answers_in_the_validation_period_the_report_says_why(prepared, tmp_path):
    done, model = prepared
    one_class = replace(EVALUATE, max_requests=5)
    told = evaluate({"model": model}, done, one_class).reliability["model"]
    assert list(told.readings) == ["none"]
    assert "needs at least 20 of each" in told.why
    with pytest.raises(DataError, match="needs at least 20 of each"):
        fit_calibration("platt", model, done, most=5)


def test_publish_puts_the_map_that_was_asked_for_into_the_bundle(prepared, mlflow_uri, tmp_path):
    done, _ = prepared
    workspace = tmp_path / "shop"
    workspace.mkdir()
    (workspace / "prepared").symlink_to(done.directory)
    trained = train(load_config(find_config("popularity")), done, workspace / "runs" / "popular", mlflow_uri)

    def publish(method: str):
        options = ["--ranker", "popular", "--text-encoder", "none", "--calibration", method, "--mlflow", mlflow_uri]
        return CliRunner().invoke(app, ["publish", *options, "--workspace", str(workspace)])

    wrong = publish("softmax")
    assert isinstance(wrong.exception, ConfigError)
    assert "isotonic, platt" in str(wrong.exception)
    right = publish("isotonic")
    assert right.exit_code == 0, right.output
    expected = fit_calibration("isotonic", trained.model, done)
    assert Bundle.load(workspace / "bundle").calibration == expected
    assert expected.answers == len(done.requests(VALID_IMPRESSIONS))


@pytest.mark.parametrize("method", METHODS)
def test_answers_tell_the_probabilities_of_the_scores_in_the_same_order(tmp_path, method):
    calibration = fit_scores(method, *drawn(5, 2_000), answers=500)
    plain = contents(named("dare"), named("mqsa_ted"))
    write_bundle(tmp_path / "plain", plain, PROVENANCE)
    write_bundle(tmp_path / "told", replace(plain, calibration=calibration), PROVENANCE)
    raw, told = (Recommender(Bundle.load(tmp_path / name), Nobody()) for name in ("plain", "told"))
    assert told.bundle.calibration == calibration
    known = [item for item in told.bundle.item_ids if item]
    history = [InlineEvent(item_id=item, timestamp=place + 1) for place, item in enumerate(known[:6])]
    ask = RecommendRequest(history=history, k=20, at=100)
    one, other = raw.recommend(ask, 100), told.recommend(ask, 100)
    assert (one.calibrated, other.calibrated) == (False, True)
    assert [item.item_id for item in one.items] == [item.item_id for item in other.items]
    expected = calibration.of(np.array([item.score for item in one.items], np.float32)).astype(np.float32)
    assert [item.score for item in other.items] == expected.tolist()
    rank = RankRequest(history=history, item_ids=known[::-1], at=100)
    first, second = raw.rank(rank, 100), told.rank(rank, 100)
    assert first.ranked == second.ranked
    assert second.calibrated
    assert second.scores == calibration.of(np.array(first.scores, np.float32)).astype(np.float32).tolist()
    by_popularity = told.recommend(RecommendRequest(user_id="nobody", k=3), 100)
    assert not by_popularity.calibrated
    assert by_popularity.items == raw.recommend(RecommendRequest(user_id="nobody", k=3), 100).items


@pytest.mark.parametrize("method", METHODS)
def test_no_number_of_examples_makes_a_probability_0_or_1(method):
    """Not even of scores that part taken and others without an error: 1 / (n + 2) and (t + 1) / (t + 2) are left."""
    label = np.repeat([False, True], [30, 50])
    found = fit_scores(method, label.astype(np.float32), label, 80).of(np.array([-5.0, 0.0, 1.0, 5.0], np.float32))
    assert found.min() >= (1 / 32 if method == "isotonic" else 0)
    assert found.max() <= (51 / 52 if method == "isotonic" else 1)
    np.testing.assert_allclose(found[1:3], [1 / 32, 51 / 52], atol=1e-4)


def test_how_many_of_each_a_calibration_wants():
    score = np.linspace(0, 1, 40).astype(np.float32)
    fit_scores("platt", score, score > 0.5, 9)  # 20 of each
    with pytest.raises(DataError, match="19 items taken and 21 not taken"):
        fit_scores("platt", score, score > score[20], 9)
