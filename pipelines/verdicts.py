"""Verdicts: whether one model is better than another, and how many users it would take to tell.

Two files. The paired difference on the same requests, with its interval over resampled users: better or worse where
the interval leaves out zero, else "cannot tell". It speaks of these two files only: a model trained once more with
another seed is another file.

Two methods. A method is all runs that differ in nothing but the seed. Its verdict needs at least `least_seeds` runs of
either, and both the users and the seeds are resampled. Few seeds resampled as they are spread too little, so the drawn
mean's distance from the mean is stretched by sqrt(n / (n - 1)), and the interval takes the quantile of Student's t with
Welch and Satterthwaite's degrees of freedom, users counted as certain (Welch, Biometrika 34, 1947).

Twins (two files of one method) differ by the luck of the seed. How far luck goes is estimated from all runs of the
method, so that a difference within it is "cannot tell".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from recsys.bootstrap import LEAST_USERS, Estimate
from recsys.metrics import Floats
from recsys.randomness import generator

Word = Literal["better", "worse", "cannot tell", "not defined"]


@dataclass(frozen=True)
class Verdict:
    """How `model` stands against `other` in one metric of one segment ("" is all requests).

    `users_needed` is about how many users would tell a true difference of this size apart in a share `power` of
    studies; None where more users would not help: nothing differs, or too few seeds.
    """

    kind: Literal["files", "twins", "methods"]
    model: str
    other: str
    segment: str
    metric: str
    word: Word
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    users: int
    users_needed: int | None
    why: str = ""

    @property
    def turned(self) -> "Verdict":
        """The same verdict, read from the other's side."""
        word = cast(Word, {"better": "worse", "worse": "better"}.get(self.word, self.word))
        low, high, value = (None if x is None else -x for x in (self.ci_high, self.ci_low, self.difference))
        return replace(self, model=self.other, other=self.model, word=word, difference=value, ci_low=low, ci_high=high)


@dataclass(frozen=True)
class Rule:
    """How sure a verdict has to be: level of the intervals, power of the users it would take, least seeds."""

    level: float = 0.95
    power: float = 0.8
    least_seeds: int = 5
    seed: int = 2023


@dataclass(frozen=True)
class Question:
    """What is decided: the metric, the segment, and the users that are resampled."""

    metric: str
    segment: str
    users: int


def of_files(ask: Question, first: tuple[str, Estimate], second: tuple[str, Estimate], rule: Rule) -> Verdict:
    """Return the verdict on two files."""
    difference = first[1].minus(second[1])
    if np.isnan(difference.value):
        return not_defined("files", ask, first[0], second[0])
    low, high = difference.interval(rule.level)
    spread = float(np.nanstd(difference.resampled)) if len(difference.resampled) else float("nan")
    return _verdict("files", ask, (first[0], second[0]), difference.value, (low, high), spread, rule)


def of_twins(ask: Question, names: tuple[str, str], runs: Mapping[str, Estimate], rule: Rule) -> Verdict:
    """Return the verdict on two files of one method, of which `runs` are all there are."""
    difference = runs[names[0]].minus(runs[names[1]])
    if np.isnan(difference.value):
        return not_defined("twins", ask, *names)
    if difference.users < LEAST_USERS:
        return _verdict("twins", ask, names, difference.value, (float("nan"), float("nan")), float("nan"), rule)
    luck = float(np.var([one.value for one in runs.values()], ddof=1))
    users = float(np.nanvar(difference.resampled))
    total = users + 2 * luck
    freedom = total**2 / ((2 * luck) ** 2 / (len(runs) - 1)) if luck else np.inf
    reach = float(np.sqrt(total) * student.ppf(0.5 + rule.level / 2, freedom))
    bounds = (difference.value - reach, difference.value + reach)
    why = f"one method: between its {len(runs)} seeds the values spread by {np.sqrt(luck):.4f}"
    return _verdict("twins", ask, names, difference.value, bounds, float("nan"), rule, why)


def of_methods(
    ask: Question, first: tuple[str, Sequence[Estimate]], second: tuple[str, Sequence[Estimate]], rule: Rule
) -> Verdict:
    """Return the verdict on two methods from the runs of each, all on the same users and resamples."""
    name, other = first[0], second[0]
    ours, theirs = (np.array([one.value for one in runs]) for _, runs in (first, second))
    value = float(ours.mean() - theirs.mean())
    if np.isnan(value):
        return not_defined("methods", ask, name, other)
    if min(one.users for one in (*first[1], *second[1])) < LEAST_USERS:
        return _verdict("methods", ask, (name, other), value, (float("nan"), float("nan")), float("nan"), rule)
    fewest = min(len(ours), len(theirs))
    if fewest < rule.least_seeds:
        why = f"{len(ours)} and {len(theirs)} seeds; a verdict on methods needs at least {rule.least_seeds} of each"
        return Verdict(
            "methods", name, other, ask.segment, ask.metric, "cannot tell", value, None, None, ask.users, None, why
        )
    low, high, of_users = between_methods(first[1], second[1], rule)
    why = f"{len(ours)} and {len(theirs)} seeds"
    return _verdict("methods", ask, (name, other), value, (low, high), of_users, rule, why)


def between_methods(
    first: Sequence[Estimate], second: Sequence[Estimate], rule: Rule = Rule()
) -> tuple[float, float, float]:
    """Return the interval of the difference of two methods' means over users and seeds, and the users' share of it.

    Args:
        first: runs of one method, that differ in their seed alone. A single run counts as certain: the interval then
            says nothing of that side's seeds.
        second: of the other, on the same users and resamples.
        rule: level, and seed of the draws.

    Returns:
        Low and high end, and the standard deviation that is due to the users.
    """
    values = [np.array([one.value for one in runs]) for runs in (first, second)]
    total = float(np.nanvar(_drawn_mean(first, rule.seed, "ours") - _drawn_mean(second, rule.seed, "theirs")))
    seeds = [float(each.var(ddof=1)) / len(each) if len(each) > 1 else 0.0 for each in values]
    below = sum(part**2 / (len(each) - 1) for part, each in zip(seeds, values, strict=True) if len(each) > 1)
    freedom = total**2 / below if below else np.inf
    value, reach = values[0].mean() - values[1].mean(), np.sqrt(total) * student.ppf(0.5 + rule.level / 2, freedom)
    return float(value - reach), float(value + reach), float(np.sqrt(max(total - sum(seeds), 0.0)))


def all_twins(ask: Question, runs: Mapping[str, Estimate], rule: Rule) -> list[Verdict]:
    """Return the verdicts on all pairs of files of one method."""
    return [of_twins(ask, pair, runs, rule) for pair in combinations(runs, 2)]


def _drawn_mean(runs: Sequence[Estimate], seed: int, purpose: str) -> Floats:
    """Return the mean over seeds drawn with replacement, on each resample of the users, float64 [resamples]."""
    table: NDArray[np.float64] = np.stack([one.resampled for one in runs])  # [seeds, resamples]
    number = len(table)
    if number == 1:
        only: Floats = table[0]
        return only
    draws = generator(seed, 0, f"seeds/{purpose}").integers(0, number, (number, table.shape[1]))
    mean = table.mean(axis=0)
    drawn: Floats = mean + np.sqrt(number / (number - 1)) * (np.take_along_axis(table, draws, 0).mean(axis=0) - mean)
    return drawn


def _verdict(
    kind: Literal["files", "twins", "methods"],
    ask: Question,
    names: tuple[str, str],
    value: float,
    bounds: tuple[float, float],
    spread: float,
    rule: Rule,
    why: str = "",
) -> Verdict:
    low, high = bounds
    if np.isnan(low) or np.isnan(high):
        return Verdict(
            kind, *names, ask.segment, ask.metric, "cannot tell", value, None, None, ask.users, None,
            f"no interval: it takes at least {LEAST_USERS} users and two resamples",
        )  # fmt: skip
    word: Word = "better" if low > 0 else "worse" if high < 0 else "cannot tell"
    needed = None
    if word == "cannot tell" and value and not np.isnan(spread):
        reach = (norm.ppf(0.5 + rule.level / 2) + norm.ppf(rule.power)) * spread / abs(value)
        needed = int(np.ceil(ask.users * max(reach**2, 1.0)))
    return Verdict(kind, *names, ask.segment, ask.metric, word, value, low, high, ask.users, needed, why)


def not_defined(kind: Literal["files", "twins", "methods"], ask: Question, model: str, other: str) -> Verdict:
    """Return the verdict where the metric has no value."""
    why = "no user has both a positive and a negative in it"
    return Verdict(kind, model, other, ask.segment, ask.metric, "not defined", None, None, None, ask.users, None, why)
