"""The formulas behind intervals and verdicts, by hand: how often they err is in test_compare.py."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from pipelines.verdicts import Question, Rule, of_files, of_methods, of_twins
from recsys.bootstrap import Basis, Estimate
from recsys.randomness import generator

USERS = 50
BASIS = Basis(USERS, 40.0, 30.0)
ASK = Question("gauc", "", USERS)
RULE = Rule()


def estimate(value, resampled, basis=BASIS):
    return Estimate(value, np.array(resampled, np.float64), basis)


def test_the_basis_of_equal_and_of_unequal_shares():
    assert Basis.of(np.ones(4)) == Basis(4, 4.0, 4.0)
    # (3 + 1)^2 / (9 + 1) users in effect (Kish), (9 + 1)^2 / (81 + 1) degrees of freedom (Satterthwaite).
    found = Basis.of(np.array([3.0, 0.0, 1.0]))
    assert (found.users, found.effective, found.freedom) == (2, pytest.approx(1.6), pytest.approx(100 / 82))
    assert Basis.of(np.zeros(3)) == Basis(0, 0.0, 0.0)


@given(st.floats(1.1, 1e4), st.floats(1, 1e4), st.floats(0.5, 0.99))
def test_the_tail_reaches_as_far_as_student_does_and_makes_up_for_n_minus_one(effective, freedom, level):
    reach = math.sqrt(effective / (effective - 1)) * student.ppf(0.5 + level / 2, freedom)
    assert Basis(9, effective, freedom).tail(level) == pytest.approx(norm.cdf(-reach), rel=1e-6)


def test_an_interval_is_the_quantiles_beyond_the_tail_and_a_difference_stands_on_the_lesser_basis():
    draws = np.random.default_rng(0)
    one = estimate(0.7, draws.normal(0.7, 0.1, 500), Basis(9, 8.0, 4.0))
    other = estimate(0.6, draws.normal(0.6, 0.1, 500), Basis(7, 9.0, 7.0))
    found = one.minus(other)
    assert found.basis == Basis(7, 8.0, 4.0)
    assert found.value == pytest.approx(0.1)
    tail = Basis(7, 8.0, 4.0).tail(0.95)
    assert found.interval() == pytest.approx(tuple(np.quantile(one.resampled - other.resampled, [tail, 1 - tail])))
    for users, defined in ((1, False), (5, False), (6, True)):  # of five, all lie on one side 1 time in 16
        few = estimate(0.7, draws.normal(size=500), Basis(users, float(users), float(users)))
        assert np.isnan(few.interval()).all() == (not defined)
    assert np.isnan(estimate(0.7, [0.7]).interval()).all()


def test_how_many_users_a_difference_would_take():
    resampled = np.tile([-0.03, 0.05], 100)
    found = of_files(ASK, ("x", estimate(0.01, resampled)), ("a", estimate(0.0, np.zeros(200))), RULE)
    reach = (norm.ppf(0.975) + norm.ppf(0.8)) * 0.04 / 0.01
    assert (found.word, found.users_needed) == ("cannot tell", math.ceil(USERS * reach**2))
    # Never fewer than there are: an interval from zero on, of a difference that is large beside its spread.
    wide = np.concatenate([[-0.1] * 10, np.full(190, 0.5)])
    sure = of_files(ASK, ("x", estimate(2.0, wide)), ("a", estimate(0.0, np.zeros(200))), RULE)
    assert (sure.word, sure.users_needed) == ("cannot tell", USERS)


def test_twins_differ_by_users_and_by_twice_the_luck_of_a_seed():
    runs = {
        "a": estimate(0.70, [0.68, 0.70, 0.74, 0.69]),
        "b": estimate(0.73, [0.72, 0.75, 0.71, 0.74]),
        "c": estimate(0.75, [0.75, 0.74, 0.76, 0.73]),
    }
    luck = np.var([0.70, 0.73, 0.75], ddof=1)
    total = np.var(runs["a"].resampled - runs["b"].resampled) + 2 * luck
    reach = math.sqrt(total) * student.ppf(0.975, total**2 / ((2 * luck) ** 2 / 2))
    found = of_twins(ASK, ("a", "b"), runs, RULE)
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.03 - reach, -0.03 + reach), abs=1e-12)


def test_methods_differ_by_users_and_by_the_seeds_of_each():
    rng = np.random.default_rng(1)
    values = {"ours": rng.normal(0.71, 0.02, 5), "theirs": rng.normal(0.70, 0.03, 6)}
    runs = {name: [estimate(one, one + rng.normal(0, 0.004, 40)) for one in own] for name, own in values.items()}
    found = of_methods(ASK, ("x", runs["ours"]), ("y", runs["theirs"]), RULE)
    drawn, parts, below = {}, {}, 0.0
    for name, estimates in runs.items():
        table, number = np.stack([one.resampled for one in estimates]), len(estimates)
        seeds = generator(RULE.seed, 0, f"seeds/{name}").integers(0, number, (number, table.shape[1]))
        mean = table.mean(0)
        # A mean of n drawn from n varies (n - 1) / n too little.
        own = np.stack([table[column, np.arange(table.shape[1])] for column in seeds]).mean(0)
        drawn[name] = mean + math.sqrt(number / (number - 1)) * (own - mean)
        parts[name] = np.var(values[name], ddof=1) / number
        below += parts[name] ** 2 / (number - 1)
    total = np.var(drawn["ours"] - drawn["theirs"])
    reach = math.sqrt(total) * student.ppf(0.975, total**2 / below)
    value = values["ours"].mean() - values["theirs"].mean()
    assert (found.ci_low, found.ci_high) == pytest.approx((value - reach, value + reach), abs=1e-12)
    # More users make the users' part smaller, more of the same seeds do not.
    users = math.sqrt(max(total - sum(parts.values()), 0.0))
    needed = USERS * max(((norm.ppf(0.975) + norm.ppf(0.8)) * users / abs(value)) ** 2, 1.0)
    assert (found.word, found.users_needed) == ("cannot tell", math.ceil(needed))


def test_a_few_users_have_no_interval_whatever_is_compared():
    alone = Basis(5, 5.0, 5.0)
    runs = {name: estimate(0.5 + 0.1 * at, [0.5 + 0.1 * at] * 9, alone) for at, name in enumerate("abcde")}
    several = list(runs.values())
    for found in (
        of_files(ASK, ("a", runs["a"]), ("b", runs["b"]), RULE),
        of_twins(ASK, ("a", "b"), runs, RULE),
        of_methods(ASK, ("a", several), ("b", several[::-1] + several[:1]), RULE),
    ):
        assert (found.word, found.ci_low, found.ci_high) == ("cannot tell", None, None)
