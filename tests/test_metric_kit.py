"""What every metric must keep: chance for a constant scorer, no say for any order, one pass = many workers.

One table names every metric of recsys.metrics with its value by chance and its independent implementations; a metric
that is not in it fails here.
"""

import inspect
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import comb, log2
from multiprocessing import get_context

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from recsys import metrics
from recsys.bootstrap import PooledAuc
from recsys.errors import DataError
from recsys.metrics import groups_of, rank

K = 5


def discounts(ranks):
    return sum(1 / log2(place + 2) for place in range(ranks))


@dataclass(frozen=True)
class Kit:
    """A metric per group, its value by chance, and who else computes it.

    Attributes:
        of: ranking -> float64 [G].
        chance: (candidates, positives) -> the expectation over all orders, by combinatorics.
        scikit: (grades, scores) of one group -> value, ties included; None where scikit-learn has no such metric.
        ir: the measure of ir-measures; None where it has none.
    """

    of: Callable
    chance: Callable
    scikit: Callable | None = None
    ir: object | None = None


KITS = {
    "auc": Kit(metrics.auc, lambda n, p: 0.5, lambda y, s: roc_auc_score(y > 0, s)),
    "ndcg": Kit(
        partial(metrics.ndcg, k=K),
        lambda n, p: p / n * discounts(min(K, n)) / discounts(min(K, p)),
        lambda y, s: ndcg_score([y], [s], k=K),
        ir_measures.nDCG @ K,
    ),
    "recall": Kit(partial(metrics.recall, k=K), lambda n, p: min(K / n, 1), ir=ir_measures.R @ K),
    "mrr": Kit(
        partial(metrics.mrr, k=K),
        lambda n, p: sum(comb(n - r, p - 1) / comb(n, p) / r for r in range(1, min(K, n) + 1)),
        ir=ir_measures.RR @ K,
    ),
    "hit_rate": Kit(
        partial(metrics.hit_rate, k=K), lambda n, p: 1 - comb(n - p, K) / comb(n, K) if n > K else 1.0,
        ir=ir_measures.Success @ K,
    ),
}  # fmt: skip
each_metric = pytest.mark.parametrize("kit", KITS.values(), ids=KITS)


def world(seed, ties, groups=30, highest=1):
    """Random groups of 2 to 30 candidates, both classes in each; float32 scores."""
    rng = np.random.default_rng(seed)
    offsets = np.r_[0, np.cumsum(rng.integers(2, 31, groups))]
    score = rng.standard_normal(offsets[-1])
    grade = rng.integers(1, highest + 1, len(score)) * (rng.random(len(score)) < 0.3)
    grade[offsets[:-1]], grade[offsets[:-1] + 1] = highest, 0
    return (np.round(score * 2) / 2 if ties else score).astype(np.float32), grade.astype(np.uint8), offsets


def test_every_metric_is_in_the_kit():
    public = inspect.getmembers(metrics, inspect.isfunction)
    own = {name for name, one in public if one.__module__ == metrics.__name__ and not name.startswith("_")}
    taking = {name for name in own if next(iter(inspect.signature(getattr(metrics, name)).parameters)) == "ranking"}
    assert taking - {"gauc"} == set(KITS)  # gauc gives one number for all groups: below, beside auc


@each_metric
@given(seed=st.integers(0, 2**32 - 1), constant=st.floats(width=32, allow_nan=False))
@settings(max_examples=20, deadline=None)
def test_a_constant_scorer_gets_chance(kit, seed, constant):
    _, label, offsets = world(seed, ties=False, groups=12)
    found = rank(np.full(len(label), constant, np.float32), label, groups_of(offsets), 12)
    expected = [kit.chance(int(n), int(p)) for n, p in zip(found.candidates, found.positives, strict=True)]
    np.testing.assert_allclose(kit.of(found), expected, rtol=1e-12, atol=0)
    assert metrics.gauc(found) == 0.5
    everybody = np.ones((1, 12), np.int32)
    assert PooledAuc.build(np.full(len(label), constant), label, groups_of(offsets)).of(everybody)[0] == 0.5


@each_metric
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_order_of_rows_candidates_and_groups_changes_nothing(kit, seed, ties):
    score, grade, offsets = world(seed, ties, groups=12, highest=3)
    group, rng = groups_of(offsets), np.random.default_rng(seed)
    once = kit.of(rank(score, grade, group, 12))
    rows = rng.permutation(len(score))
    assert np.array_equal(kit.of(rank(score[rows], grade[rows], group[rows], 12)), once)
    within = np.lexsort((rng.random(len(score)), group))  # candidates of each group shuffled, groups in place
    assert np.array_equal(kit.of(rank(score[within], grade[within], group, 12)), once)
    name = rng.permutation(12)  # the groups called otherwise
    assert np.array_equal(kit.of(rank(score, grade, name[group], 12))[name], once)
    mapped = np.exp(score.astype(np.float64) / 3) * 1e-3  # increasing, and not exact in float32
    assert np.array_equal(kit.of(rank(mapped, grade, group, 12)), once)


@pytest.fixture(scope="module")
def workers():
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield pool


@each_metric
def test_parts_ranked_by_several_workers_are_one_pass(kit, workers):
    score, grade, offsets = world(3, ties=True, groups=101, highest=3)
    whole = rank(score, grade, groups_of(offsets), 101)
    cuts = [0, 1, 40, 41, 101]  # parts of one group too
    rows = [slice(offsets[a], offsets[b]) for a, b in pairwise(cuts)]
    groups = [groups_of(offsets[a : b + 1] - offsets[a]) for a, b in pairwise(cuts)]
    parts = list(workers.map(rank, [score[r] for r in rows], [grade[r] for r in rows], groups, np.diff(cuts).tolist()))
    found = list(workers.map(kit.of, parts))
    assert np.array_equal(np.concatenate(found), kit.of(whole), equal_nan=True)
    shares = [(metrics.gauc(part), int(part.candidates.sum())) for part in parts]  # every group has both classes
    together = np.average([value for value, _ in shares], weights=[size for _, size in shares])
    assert together == pytest.approx(metrics.gauc(whole), abs=1e-12)


@pytest.mark.parametrize("name", [name for name, kit in KITS.items() if kit.scikit])
@given(seed=st.integers(0, 2**32 - 1), ties=st.booleans(), highest=st.integers(1, 4))
@settings(max_examples=6, deadline=None)
def test_agrees_with_scikit_learn_ties_included(name, seed, ties, highest):
    kit, (score, grade, offsets) = KITS[name], world(seed, ties, groups=20, highest=highest)
    found = rank(score, grade, groups_of(offsets), 20)
    expected = [kit.scikit(grade[a:b], score[a:b]) for a, b in pairwise(offsets)]
    np.testing.assert_allclose(kit.of(found), expected, rtol=0, atol=1e-9)
    if name == "auc":
        assert metrics.gauc(found) == pytest.approx(np.average(expected, weights=np.diff(offsets)), abs=1e-9)
        pooled = roc_auc_score(grade > 0, score)
        assert metrics.auc(rank(score, grade))[0] == pytest.approx(pooled, abs=1e-9)
        everybody = np.ones((1, 20), np.int32)
        built = PooledAuc.build(score, grade, groups_of(offsets))
        assert built.of(everybody)[0] == pytest.approx(pooled, abs=1e-9)


@pytest.mark.parametrize("name", [name for name, kit in KITS.items() if kit.ir])
@pytest.mark.parametrize("highest", [1, 3])
def test_agrees_with_ir_measures_without_ties(name, highest):
    kit, (score, grade, offsets) = KITS[name], world(7, ties=False, groups=200, highest=highest)
    owner = groups_of(offsets)
    qrels = [ir_measures.Qrel(str(g), str(i), int(y)) for i, (g, y) in enumerate(zip(owner, grade, strict=True))]
    run = [ir_measures.ScoredDoc(str(g), str(i), float(s)) for i, (g, s) in enumerate(zip(owner, score, strict=True))]
    found = kit.of(rank(score, grade, owner, 200))
    theirs = {int(one.query_id): one.value for one in ir_measures.iter_calc([kit.ir], qrels, run)}
    np.testing.assert_allclose(found, [theirs[g] for g in range(200)], rtol=0, atol=1e-9)


def test_what_a_ranking_does_not_keep_is_refused():
    found = replace(rank(np.arange(6, dtype=np.float32), np.arange(6) == 2), depth=3)
    metrics.ndcg(found, 3)
    with pytest.raises(DataError, match="cutoff 4: expected 1 to 3"):
        metrics.ndcg(found, 4)
    with pytest.raises(DataError, match="AUC needs every rank, this ranking keeps the first 3"):
        metrics.auc(found)
    with pytest.raises(DataError, match=r"4294967297 groups of grades up to 1 do not fit"):
        rank(np.zeros(1, np.float32), np.ones(1), groups=2**32 + 1)
