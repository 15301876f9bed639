"""How often the intervals hold and the verdicts err, in a world whose truth is known.

    OMP_NUM_THREADS=1 python tests/benchmarks/interval_coverage.py --out interval_coverage.json

Users differ in activity (1 to 32 requests) and in how well a model knows them. A request has one positive and ten
negatives; a negative scores N(0, 1), the positive N(a, 1), and a user's skill a is N(m, SPREAD) with a mean m that
grows with activity. So GAUC over all users there could be is known:

    GAUC = sum over n of p(n) n Phi(m(n) / sqrt(2 + SPREAD^2)) / sum over n of p(n) n

Both models rank the same requests with half of their noise in common. Everything after the scores is the library's own:
rank, auc, the bootstrap of the users, the verdicts. Each repetition draws new users. Coverage should be the level of
the interval and false words at most 1 - level; brackets are exact binomial (Clopper and Pearson) 95 % intervals.
"""

import argparse
import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from pipelines import verdicts
from pipelines.verdicts import Question, Rule
from recsys.bootstrap import Estimate, Ratio, bootstrap
from recsys.metrics import auc, rank
from recsys.randomness import generator

REQUESTS = np.array([1, 2, 4, 8, 16, 32])
SHARE = np.array([0.35, 0.25, 0.18, 0.12, 0.07, 0.03])  # of the users with that many requests
NEGATIVES = 10
SPREAD = 0.5  # of skill between users, and each model's own
GROWTH = 0.1  # of skill per doubling of activity
LUCK = 0.02  # of skill between seeds: about 0.005 of GAUC
SEEDS = 5


@dataclass(frozen=True)
class Users:
    """One draw of the world: whose each request is, activity per user, and the noise all models share."""

    owner: NDArray[np.int64]
    activity: NDArray[np.int64]
    noise: NDArray[np.float64]  # [requests, 1 + NEGATIVES]


@dataclass(frozen=True)
class Share:
    """A share of repetitions: what it is of, what it should be, and its exact binomial interval."""

    world: str
    users: int
    of: str
    wanted: str
    count: int
    total: int
    low: float
    high: float

    @staticmethod
    def build(world: str, users: int, of: str, wanted: str, count: int, total: int) -> "Share":
        """Return the share with its interval."""
        ends = binomtest(count, total).proportion_ci(method="exact")
        return Share(world, users, of, wanted, count, total, float(ends.low), float(ends.high))


def draw_users(number: int, rng: np.random.Generator) -> Users:
    """Draw users who differ in activity."""
    activity = rng.choice(REQUESTS, number, p=SHARE)
    owner = np.repeat(np.arange(number), activity)
    return Users(owner, activity, rng.standard_normal((len(owner), 1 + NEGATIVES)))


def skill(users: Users, mean: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw how well a model knows each user, float64 [users]."""
    return mean + GROWTH * np.log2(users.activity) + SPREAD * rng.standard_normal(len(users.activity))


def truth(mean: float) -> float:
    """Return GAUC over all users there could be."""
    reach = norm.cdf((mean + GROWTH * np.log2(REQUESTS)) / np.sqrt(2 + SPREAD**2))
    return float(np.average(reach, weights=SHARE * REQUESTS))


def score(users: Users, known: NDArray[np.float64], rng: np.random.Generator) -> Ratio:
    """Score every candidate and give GAUC as the library resamples it."""
    own = rng.standard_normal(users.noise.shape)
    scores = np.sqrt(0.5) * (users.noise + own)
    scores[:, 0] += known[users.owner]
    label = np.zeros(scores.shape, np.uint8)
    label[:, 0] = 1
    number = len(users.activity)
    ranking = rank(scores.astype(np.float32).ravel(), label.ravel(), np.repeat(users.owner, 1 + NEGATIVES), number)
    return Ratio.of_groups(auc(ranking), np.arange(number), number, ranking.candidates)


def estimates(found: dict[str, Ratio], users: Users, resamples: int, seed: int) -> dict[str, Estimate]:
    """Resample the users, the same for all models."""
    return bootstrap(found, len(users.activity), resamples, seed)


def two_files(number: int, repetitions: int, resamples: int, gap: float) -> list[Share]:
    """Compare two models whose mean skill differs by `gap`, again and again."""
    world = "equal models" if gap == 0 else f"GAUC differs by {truth(0.9 + gap) - truth(0.9):.4f}"
    expected, words, covered = truth(0.9 + gap) - truth(0.9), Counter[str](), 0
    for seed in range(repetitions):
        rng = generator(seed, number, f"coverage/{gap}")
        users = draw_users(number, rng)
        both = {name: score(users, skill(users, mean, rng), rng) for name, mean in (("a", 0.9 + gap), ("b", 0.9))}
        found = estimates(both, users, resamples, seed)
        verdict = verdicts.of_files(Question("gauc", "", number), ("a", found["a"]), ("b", found["b"]), Rule())
        words[verdict.word] += 1
        covered += (verdict.ci_low or 0.0) <= expected <= (verdict.ci_high or 0.0)
    shares = [Share.build(world, number, "interval holds the truth", "95 %", covered, repetitions)]
    if gap == 0:
        false = words["better"] + words["worse"]
        return [*shares, Share.build(world, number, "a false verdict", "at most 5 %", false, repetitions)]
    return [
        *shares,
        Share.build(world, number, "the better one is found", "power", words["better"], repetitions),
        Share.build(world, number, "the worse one is called better", "near 0", words["worse"], repetitions),
    ]


def two_methods(number: int, repetitions: int, resamples: int) -> list[Share]:
    """Compare two equal methods of SEEDS runs each, and the runs of the first with each other."""
    false = told_apart = 0
    for seed in range(repetitions):
        rng = generator(seed, number, "coverage/methods")
        users = draw_users(number, rng)
        runs = {}
        for method in "ab":
            known = skill(users, 0.9, rng)
            for run in range(SEEDS):
                runs[f"{method}{run}"] = score(users, known + LUCK * rng.standard_normal(), rng)
        found = estimates(runs, users, resamples, seed)
        ask, sides = Question("gauc", "", number), [[found[f"{m}{r}"] for r in range(SEEDS)] for m in "ab"]
        false += verdicts.of_methods(ask, ("a", sides[0]), ("b", sides[1]), Rule()).word != "cannot tell"
        twins = verdicts.all_twins(ask, {f"a{r}": one for r, one in enumerate(sides[0])}, Rule())
        told_apart += twins[0].word != "cannot tell"  # one pair per repetition: those of one are not independent
    return [
        Share.build("equal methods, 5 seeds each", number, "a false verdict", "at most 5 %", false, repetitions),
        Share.build("twins of 5 seeds", number, "a false verdict", "at most 5 %", told_apart, repetitions),
    ]


def main() -> None:
    """Print a table and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--gap", type=float, default=0.05, help="difference of mean skill of the unequal models")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started, size = time.perf_counter(), (options.repetitions, options.resamples)
    found = []
    for number in options.users:
        for gap in (0.0, options.gap):
            found += two_files(number, *size, gap)
    found += two_methods(options.users[0], *size)
    print("| world | users | share of repetitions | wanted | found |\n|---|---|---|---|---|")
    for one in found:
        share = f"{100 * one.count / one.total:.1f} % [{100 * one.low:.1f} to {100 * one.high:.1f}]"
        print(f"| {one.world} | {one.users:,} | {one.of} | {one.wanted} | {share} |")
    seconds = time.perf_counter() - started
    print(f"{options.repetitions:,} repetitions, {options.resamples:,} resamples, {seconds:.0f} s")
    if options.out:
        about = {"repetitions": size[0], "resamples": size[1], "seconds": seconds, "shares": [asdict(o) for o in found]}
        options.out.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
