"""Segments: who and what belongs to each, thresholds from training alone, and what is measured in them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluate import evaluate
from pipelines.evaluation import EvaluateConfig
from pipelines.measures import Pool, on_candidates, segment_facts
from pipelines.prepared import PreparedSet
from pipelines.scoring import draw_requests, in_history
from pipelines.segments import Segment, SegmentsConfig, first_seen, popularity_bounds, segments_of
from ranking.models import RANKERS
from recsys.config import parse
from recsys.errors import ConfigError
from recsys.metrics import auc, groups_of, rank, weighted_mean

CONFIG = EvaluateConfig(resamples=30, full_ranking_requests=5, max_requests=60, cold_requests=0)


@pytest.fixture(scope="module")
def pool(prepared: PreparedSet) -> Pool:
    chosen = draw_requests(prepared, "test", 60, seed=0)
    sets = prepared.candidates("test", "uniform").take(chosen.index)
    return Pool(chosen, sets, groups_of(sets.offsets), in_history(prepared, chosen, sets))


def found(prepared: PreparedSet, pool: Pool, **options) -> dict[str, Segment]:
    config = SegmentsConfig(**options)
    return {s.name: s for s in segments_of(prepared, pool.sample, pool.request, pool.sets.item, config)}


def test_bounds_of_head_and_tail_by_arithmetic():
    # 100 events: 50 + 20 + 10 + 10 + 5 + 5; the first item alone is half, the last two are a tenth
    count = np.array([5, 50, 10, 0, 20, 5, 10])
    assert popularity_bounds(count, 0.5, 0.1) == (50, 5)
    assert popularity_bounds(count, 0.6, 0.2) == (20, 5)  # both 10s with both 5s would be three tenths
    assert popularity_bounds(count, 0.7, 0.3) == (20, 10)
    assert popularity_bounds(np.array([50, 10, 10, 10, 10, 10]), 0.5, 0.2) == (50, 0)  # the 10s are half
    assert popularity_bounds(np.zeros(3, np.int64), 0.5, 0.2) == (1, 0)
    head, tail = popularity_bounds(np.ones(4, np.int64), 0.5, 0.2)
    assert tail < head  # no item is in both


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.floats(0.05, 0.95), st.floats(0.01, 0.9))
def test_the_head_has_its_share_and_the_tail_no_more_than_its_own(counts, head_share, tail_share):
    count = np.array(counts)
    head, tail = popularity_bounds(count, head_share, tail_share)
    assert tail < head
    assert count[count >= head].sum() >= head_share * count.sum() > count[count > head].sum()
    assert count[count <= tail].sum() <= tail_share * count.sum()


def test_an_item_first_taken_in_the_request_itself_was_never_seen_before(prepared, pool, monkeypatch):
    at, label = pool.sample.requests.at[pool.request], pool.sets.label > 0
    first = first_seen(prepared)
    first[pool.sets.item[label][0]] = at[label][0]  # as if nobody had taken it before
    monkeypatch.setattr("pipelines.segments.first_seen", lambda _: first)
    segments, seen = found(prepared, pool), first[pool.sets.item]
    new = segments["item_age_unseen"].kept(pool.request, pool.sets.item, label) & label
    assert np.array_equal(new, label & (seen >= at))
    assert new.any()
    young = segments["item_age_0_29"].kept(pool.request, pool.sets.item, label) & label
    assert (seen[young] < at[young]).all()


def test_popularity_age_and_category_each_divide_the_positives(prepared, pool):
    segments = found(prepared, pool, item_columns=("department",), values=10**6)
    label = pool.sets.label > 0
    kept = {name: segment.kept(pool.request, pool.sets.item, label) for name, segment in segments.items()}
    for start in ("popularity_", "item_age_", "item_department_"):
        parts = [mask for name, mask in kept.items() if name.startswith(start)]
        parts += [kept["cold_items"]] if start == "popularity_" else []
        total = sum(mask[label].astype(int) for mask in parts)
        untold = label & (pool.sets.item == 1) if start != "item_department_" else None
        assert (total <= 1).all()
        if start == "item_age_":
            assert (total == 1).all()
        assert untold is None or total.sum() >= (label & (pool.sets.item > 1)).sum()
    for name, mask in kept.items():  # a segment of positives holds all negatives of its requests and of no other
        if segments[name].requests is None:
            having = np.unique(pool.request[mask & label])
            assert np.array_equal(mask[~label], np.isin(pool.request, having)[~label])


def test_new_users_and_ages_follow_their_definitions(prepared, pool):
    segments = found(prepared, pool)
    requests, histories = pool.sample.requests, prepared.histories
    valid = prepared.manifest["cuts"]["valid"]
    expected = [not (histories.of(user).time < valid).any() for user in requests.user.tolist()]
    assert segments["new_users"].requests.tolist() == expected
    first = first_seen(prepared)
    rows = prepared.key_to_row[np.asarray(histories.events.item)]
    for row in np.unique(rows)[:20]:
        assert first[row] == histories.events.time[rows == row].min()
    age = (requests.at[pool.request] - first[pool.sets.item]) / 86_400_000_000
    assert np.array_equal(segments["item_age_30_179"].positives, (age >= 30) & (age < 180))


def test_a_user_column_divides_the_requests(prepared, pool):
    segments = found(prepared, pool, user_columns=("income",), values=100, item_columns=())
    parts = [s.requests for s in segments.values() if s.name.startswith("user_income")]
    assert np.sum(parts, axis=0).tolist() == [1] * len(pool.sample)
    with pytest.raises(ConfigError, match=r"user_columns: no column 'salary'; the users have .*income"):
        found(prepared, pool, user_columns=("salary",))
    with pytest.raises(ConfigError, match=r"item_columns: no column 'colour'; the items have department"):
        found(prepared, pool, item_columns=("colour",))


def test_values_equal_their_plain_definition_and_an_empty_segment_is_counted_not_defined(prepared, pool):
    score = np.random.default_rng(0).standard_normal(len(pool.sets.item)).astype(np.float32)
    nobody = Segment("nobody", "test", "nobody", rows=np.zeros(len(prepared.items), bool))
    segments = [*found(prepared, pool).values(), nobody]
    result = on_candidates(pool, score, CONFIG, segments)
    users, user = np.unique(pool.sample.requests.user, return_inverse=True)
    label = pool.sets.label > 0
    one = np.ones((1, len(users)), np.int32)
    for segment in segments:
        kept = segment.kept(pool.request, pool.sets.item, label)
        facts = segment_facts(pool, segment)
        assert facts.positives == (label & kept).sum()
        if facts.positives:
            by_user = rank(score[kept], label[kept], user[pool.request[kept]], len(users))
            expected = weighted_mean(auc(by_user), by_user.candidates)
            assert result.statistics[f"segment/{segment.name}/gauc"].of(one)[0] == pytest.approx(expected, nan_ok=True)
    assert segment_facts(pool, nobody).positives == 0
    assert "segment/nobody/gauc" not in result.statistics


def test_differences_by_segment_are_from_the_champion(prepared):
    models = {
        name: RANKERS[name][1](RANKERS[name][0](), prepared.items) for name in ("popularity", "personal_frequency")
    }
    result = evaluate(models, prepared, replace(CONFIG, champion="popularity"))
    told = [s.name for s in result.segments if s.positives]
    assert {"popularity_head", "popularity_middle"} <= set(told)
    metric = "segment/popularity_middle/gauc"
    difference = result.compare("uniform", metric, "personal_frequency", "popularity")
    ours, theirs = (result.metric(name, "uniform", metric) for name in ("personal_frequency", "popularity"))
    assert difference.difference == pytest.approx(ours - theirs)
    assert [one.models for one in result.agreement] == [2, 2]
    assert all(one.tau in (-1, 1) for one in result.agreement)
    with pytest.raises(ConfigError, match=r"champion is 'dare'; expected one of the models"):
        evaluate(models, prepared, replace(CONFIG, champion="dare"))


def test_settings_that_cannot_be_meant():
    for table, words in (
        ({"head_share": 0.9, "tail_share": 0.2}, "together make at most 1"),
        ({"item_age_days": [30, 7]}, "ascending"),
        ({"values": 0}, "at least 1"),
        ({"item_colums": []}, "did you mean 'item_columns'"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse(SegmentsConfig, table, "evaluate.toml [segments]")
