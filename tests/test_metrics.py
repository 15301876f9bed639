"""Metrics by arithmetic and by brute force over all tie orders; test_metric_kit.py has what every metric must keep."""

from fractions import Fraction
from itertools import pairwise, permutations
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import roc_auc_score

from recsys.bootstrap import BinnedAuc, PooledAuc, Ratio, bootstrap, pooled_auc
from recsys.errors import DataError
from recsys.metrics import auc, gauc, groups_of, hit_rate, mean, mrr, ndcg, ordered_bits, rank, recall, weighted_mean


def one(score, label):
    return rank(np.array(score, np.float32), np.array(label, np.uint8))


# -- expected values as arithmetic ------------------------------------------------------------------------------------


def test_auc_and_gauc_of_two_users():
    score = np.array([0.9, 0.8, 0.8, 0.1, 0.3, 0.7])
    label = np.array([1, 0, 1, 0, 1, 0])
    user = np.array([0, 0, 0, 0, 1, 1])
    users = rank(score, label, user, 2)
    # user 0: pairs .9>.8, .9>.1, .8=.8, .8>.1 -> (1 + 1 + 1/2 + 1) / 4; user 1: .3<.7 -> 0
    assert auc(users).tolist() == [3.5 / 4, 0.0]
    assert gauc(users) == pytest.approx((4 * 0.875 + 2 * 0.0) / (4 + 2), abs=1e-15)
    assert mean(auc(users)) == (0.875 + 0.0) / 2


def test_ndcg_of_graded_gains_with_its_own_ideal_at_every_cutoff():
    # gains in the order found: 2, 3, 0, 1, 0; best order: 3, 2, 1, 0, 0
    found = one([4, 5, 2, 3, 1], [3, 2, 1, 0, 0])
    second, third = 1 / log2(3), 1 / log2(4)
    assert ndcg(found, 1)[0] == pytest.approx(2 / 3)
    assert ndcg(found, 2)[0] == pytest.approx((2 + 3 * second) / (3 + 2 * second))
    assert ndcg(found, 3)[0] == pytest.approx((2 + 3 * second + 0 * third) / (3 + 2 * second + 1 * third))
    assert [round(float(ndcg(found, k)[0]), 6) for k in (1, 2, 3)] == [0.666667, 0.913402, 0.817494]


def test_cutoffs_by_rank():
    single = one([9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 1, 0, 0, 0])  # the positive at rank 3 counted from 0
    assert ndcg(single, 5)[0] == pytest.approx(1 / log2(3 + 2))  # .430677
    assert mrr(single, 5)[0] == 1 / 4
    assert ndcg(single, 3)[0] == mrr(single, 3)[0] == recall(single, 3)[0] == hit_rate(single, 3)[0] == 0
    late = one([9, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 1, 0])  # rank 5 is outside a list of 5
    assert ndcg(late, 5)[0] == 0
    two = one([9, 8, 7, 6], [0, 1, 0, 1])
    assert (recall(two, 2)[0], hit_rate(two, 2)[0], mrr(two, 2)[0]) == (1 / 2, 1, 1 / 2)


def test_a_tie_is_worth_its_expectation():
    tied = one([2, 1, 1, 1, 0], [0, 1, 0, 1, 0])  # one negative, then a tie of two positives and one negative
    # first positive at rank 2 with chance 2/3, else at rank 3
    assert mrr(tied, 5)[0] == pytest.approx(2 / 3 * 1 / 2 + 1 / 3 * 1 / 3)
    assert hit_rate(tied, 2)[0] == pytest.approx(2 / 3)
    assert recall(tied, 3)[0] == pytest.approx(
        2 / 3
    )  # 2 of the 3 tied places, each a positive with chance 2/3: 4/3 of 2
    assert auc(tied)[0] == pytest.approx((0 + 1 / 2 + 1 + 0 + 1 / 2 + 1) / 6)


# -- properties -------------------------------------------------------------------------------------------------------

small = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        arrays.arrays(np.float32, n, elements=st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 0.25, 1e-30, 7, np.inf])),
        arrays.arrays(np.uint8, n, elements=st.sampled_from([0, 0, 1, 1, 3])),
        st.integers(1, 7),
    )
)


@given(small)
@settings(max_examples=150, deadline=None)
def test_every_formula_is_the_mean_over_all_orders_that_respect_the_scores(case):
    score, label, k = case
    orders = [o for o in permutations(range(len(score))) if all(score[a] >= score[b] for a, b in pairwise(o))]
    found = rank(score, label)
    positives = int((label > 0).sum())
    best = sorted(label.tolist(), reverse=True)
    ideal = sum(gain / log2(place + 2) for place, gain in enumerate(best[:k]))

    def expected(value):
        return sum(value([int(label[i]) for i in order]) for order in orders) / len(orders)

    if positives == 0:
        assert all(np.isnan(metric(found, k)[0]) for metric in (ndcg, recall, mrr, hit_rate))
    else:
        dcg = expected(lambda gains: sum(gain / log2(place + 2) for place, gain in enumerate(gains[:k])))
        first = [lambda gains: next((1 / (p + 1) for p, gain in enumerate(gains[:k]) if gain), 0.0)]
        assert ndcg(found, k)[0] == pytest.approx(dcg / ideal, abs=1e-12)
        assert recall(found, k)[0] == pytest.approx(expected(lambda g: sum(x > 0 for x in g[:k])) / positives)
        assert mrr(found, k)[0] == pytest.approx(expected(first[0]), abs=1e-12)
        assert hit_rate(found, k)[0] == pytest.approx(expected(lambda g: any(g[:k])), abs=1e-12)
    pairs = [
        Fraction(1, 2) if score[i] == score[j] else Fraction(int(score[i] > score[j]))
        for i in range(len(score))
        for j in range(len(score))
        if label[i] > 0 and label[j] == 0
    ]
    expected_auc = float(sum(pairs) / len(pairs)) if pairs else float("nan")
    assert auc(found)[0] == pytest.approx(expected_auc, abs=1e-15, nan_ok=True)


def random_groups(seed, ties, groups=40):
    rng = np.random.default_rng(seed)
    offsets = np.r_[0, np.cumsum(rng.integers(2, 30, groups))]
    score = rng.standard_normal(offsets[-1])
    score = np.round(score * 2) / 2 if ties else score
    label = (rng.random(offsets[-1]) < 0.3).astype(np.uint8)
    label[offsets[:-1]], label[offsets[:-1] + 1] = 1, 0  # both classes in every group
    return score.astype(np.float32), label, offsets


@given(arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(allow_nan=False)))
def test_codes_keep_the_order_and_the_ties_of_any_scores(score):
    code = ordered_bits(score).astype(np.int64)
    difference = np.subtract.outer(code, code)
    assert np.array_equal(difference > 0, score[:, None] > score[None, :])
    assert np.array_equal(difference == 0, score[:, None] == score[None, :])


def test_what_is_refused_and_what_is_skipped():
    with pytest.raises(DataError, match="score of row 2 is NaN"):
        rank(np.array([1.0, 2.0, np.nan, np.nan]), np.array([0, 1, 0, 1]))
    with pytest.raises(DataError, match=r"label of row 1 is 0\.5"):
        rank(np.zeros(2), np.array([1, 0.5]))
    with pytest.raises(DataError, match="3 scores for 2 labels"):
        rank(np.zeros(3), np.zeros(2))
    with pytest.raises(DataError, match="below 2"):
        rank(np.zeros(3), np.zeros(3), np.array([0, 1, 2]), 2)
    # group 0 has only positives, group 1 only negatives, group 2 nothing at all
    found = rank(np.arange(4), np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1]), 3)
    assert np.isnan(auc(found)).all()
    assert np.isnan(ndcg(found, 2)).tolist() == [False, True, True]
    assert np.isnan(weighted_mean(auc(found), found.candidates))
    assert mean(recall(found, 1)) == 0.5


# -- bootstrap over users ---------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_a_resample_equals_the_metric_on_the_repeated_rows(seed):
    rng = np.random.default_rng(seed)
    score, label, offsets = random_groups(seed, ties=True, groups=8)
    user = groups_of(offsets)
    weight = np.bincount(rng.integers(0, 8, 8), minlength=8).astype(np.int32)
    rows = np.repeat(np.arange(len(score)), weight[user])
    pooled = PooledAuc.build(score, label, user).of(weight[None])[0]
    assert pooled == pytest.approx(roc_auc_score(label[rows], score[rows]), abs=1e-12)
    found = rank(score, label, user, 8)
    ratio = Ratio.of_groups(auc(found), np.arange(8), 8, found.candidates).of(weight[None])[0]
    drawn = np.repeat(np.arange(8), weight)
    assert ratio == pytest.approx(np.average(auc(found)[drawn], weights=found.candidates[drawn]), abs=1e-12)


@pytest.mark.parametrize("ties", [True, False])
def test_the_auc_by_bins_is_the_exact_one_but_for_a_trace(ties):
    rng = np.random.default_rng(3)
    size, users = 40_000, 400
    score = rng.standard_normal(size).round(1 if ties else 7).astype(np.float32)
    label, user = rng.random(size) < 1 / (9 + np.exp(-score)), rng.integers(0, users, size)
    exact, binned = PooledAuc.build(score, label, user), BinnedAuc.build(score, label, user, users)
    ones = np.ones((1, users), np.int32)
    assert binned.of(ones) == pytest.approx(exact.of(ones), abs=1e-12)
    few = [bootstrap({"auc": one}, users, 60, seed=1)["auc"].resampled for one in (exact, binned)]
    spread = few[0].std()
    assert spread > 0.002
    assert np.abs(few[1] - few[0]).max() < spread / 100
    whole = rng.integers(0, 9, size).astype(np.float32)  # every bin holds one value: nothing is left out
    exact, binned = PooledAuc.build(whole, label, user), BinnedAuc.build(whole, label, user, users)
    few = [bootstrap({"auc": one}, users, 20, seed=1)["auc"].resampled for one in (exact, binned)]
    np.testing.assert_allclose(few[1], few[0], atol=1e-12)
    assert (binned.shares() == exact.shares()).all()


def test_the_auc_goes_by_bins_where_candidates_are_many(monkeypatch):
    score, label, user = np.arange(6, dtype=np.float32), np.array([0, 1, 0, 1, 1, 0]), np.array([0, 0, 1, 1, 2, 2])
    assert isinstance(pooled_auc(score, label, user, 3), PooledAuc)
    monkeypatch.setattr("recsys.bootstrap.EXACT", 5)
    found = pooled_auc(score, label, user, 3)
    assert isinstance(found, BinnedAuc)
    weight = np.ones((1, 3), np.int32)
    np.testing.assert_allclose(found.of(weight), PooledAuc.build(score, label, user).of(weight), atol=1e-12)
    for one_class in (np.zeros(6), np.ones(6)):
        assert np.isnan(pooled_auc(score, one_class, user, 3).of(weight)).all()


def test_the_interval_of_a_mean_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        values = rng.normal(0.0, 1.0, 60)
        low, high = bootstrap({"m": Ratio(values, np.ones(60))}, 60, 300, seed=trial)["m"].interval()
        inside += low <= 0.0 <= high
    # 95 % of 200 is 190, standard deviation 3; percentile intervals of 60 users are a little narrow
    assert 176 <= inside <= 199


def test_paired_differences_use_the_same_resamples_and_draws_depend_on_the_seed_only():
    rng = np.random.default_rng(1)
    base = rng.normal(size=50)
    users = np.ones(50)
    statistics = {"a": Ratio(base, users), "b": Ratio(base + 0.01, users)}
    both = bootstrap(statistics, 50, 200, seed=3)
    difference = both["b"].minus(both["a"])
    assert difference.interval() == pytest.approx((0.01, 0.01))  # the shared noise cancels
    alone = bootstrap({"a": statistics["a"]}, 50, 200, seed=3)["a"]
    assert np.array_equal(alone.resampled, both["a"].resampled)
    assert not np.array_equal(alone.resampled, bootstrap(statistics, 50, 200, seed=4)["a"].resampled)
    nobody = bootstrap({"x": Ratio(np.zeros(5), np.zeros(5))}, 5, 10, seed=0)["x"]
    assert np.isnan(nobody.value)
    assert np.isnan(nobody.interval()).all()
