"""Confidence intervals by resampling users, with everything a resample needs computed once.

Users, not requests, are drawn with replacement: one user's requests are alike. A resample is a vector of whole weights
(how often each user was drawn), and resample r is a function of (seed, r) alone, so that two models judged with the
same seed see the same resamples and their differences are paired.

    U users   R resamples   N candidates
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from recsys.metrics import Floats, ordered_bits, ratio
from recsys.randomness import generator

Value = tuple[float | None, float | None, float | None]
"""A value and the ends of its interval; None where not defined."""

EXACT = 1 << 20
"""Most candidates whose pooled AUC is counted pair by pair at every resample."""

LOW = np.uint64(0xFFFFFFFF)

CHUNK = 1 << 22
"""Most weights (resamples x users) held at once: 16 MiB."""


class Statistic(Protocol):
    """A number computed from users, each with a weight."""

    def of(self, weights: NDArray[np.int32]) -> Floats:
        """Return float64 [R] for weights int32 [R, U]; NaN where it is not defined."""
        ...

    def shares(self) -> Floats:
        """Return how much of it each user makes up, float64 [U], of any scale; 0 for those it does not depend on."""
        ...


@dataclass(frozen=True)
class Ratio:
    """Sum of `numerator` over sum of `denominator`, both float64 [U]: any mean over requests or users."""

    numerator: Floats
    denominator: Floats

    def of(self, weights: NDArray[np.int32]) -> Floats:
        """Return the ratio per resample. Cost: two products of [R, U] with [U]."""
        above, below = (weights @ np.stack([self.numerator, self.denominator], axis=1)).T
        return ratio(above, below)

    def shares(self) -> Floats:
        """Return the denominator."""
        return self.denominator

    @staticmethod
    def of_groups(values: Floats, user: NDArray[np.int64], users: int, weight: Floats | None = None) -> "Ratio":
        """Return the (weighted) mean of per-group values; groups where the metric is NaN are left out.

        Args:
            values: float64 [G], a metric per group (request or user).
            user: int64 [G], whose group it is, 0..U-1.
            users: U.
            weight: float64 [G]; ones if absent.
        """
        defined = ~np.isnan(values)
        weight = np.ones(len(values)) if weight is None else weight.astype(np.float64)
        return Ratio(
            np.bincount(user[defined], (values * weight)[defined], users).astype(np.float64),
            np.bincount(user[defined], weight[defined], users).astype(np.float64),
        )


def equal_bins(values: Floats, bins: int) -> NDArray[np.int64]:
    """Return the bin of each value, 0..bins-1, int64 [N], of about equal size; equal values share one."""
    if not len(values):
        return np.empty(0, np.int64)
    ascending = np.sort(values)
    edges = np.unique(ascending[[len(ascending) * number // bins for number in range(1, bins)]])
    return np.searchsorted(edges, values, "right")


@dataclass(frozen=True)
class CalibrationError:
    """How far probabilities lie from what happened: the mean over candidates of |mean probability - rate| of their bin.

    Expected calibration error (Naeini, Cooper, Hauskrecht 2015) over bins of equal size (Nguyen, O'Connor 2015): rates
    of what is shown are small, and bins of equal width would put nearly all in one. The bins are those of all users,
    whoever is drawn.
    """

    gap: Floats  # [U, bins], sum of probability - label
    count: Floats  # [U]

    @staticmethod
    def build(
        probability: Floats, label: NDArray[np.generic], user: NDArray[np.int64], users: int, bins: int = 15
    ) -> "CalibrationError":
        """Sort once; equal probabilities share a bin. Arguments are [N]; users are 0..users-1."""
        place = user * bins + equal_bins(probability, bins)
        gap = np.bincount(place, probability - label.astype(bool), users * bins).astype(np.float64)
        return CalibrationError(gap.reshape(users, bins), np.bincount(user, minlength=users).astype(np.float64))

    def of(self, weights: NDArray[np.int32]) -> Floats:
        """Return the error per resample. Cost: a product of [R, U] with [U, bins]."""
        return ratio(np.abs(weights @ self.gap).sum(axis=1), weights @ self.count)

    def shares(self) -> Floats:
        """Return the candidates of each user."""
        return self.count


@dataclass(frozen=True)
class PooledAuc:
    """The AUC over all candidates of all users, ready to be recomputed exactly for any user weights.

    Negatives lie in ascending order of score; positive i beats the first low[i] of them and ties with those up to
    high[i]. A resample is then one cumulative sum over the negatives' weights: no sorting, whole numbers throughout.
    """

    negative_user: NDArray[np.int32]  # [negatives]
    positive_user: NDArray[np.int32]  # [positives]
    low: NDArray[np.int64]  # [positives]
    high: NDArray[np.int64]  # [positives]

    @staticmethod
    def build(score: NDArray[np.floating], label: NDArray[np.generic], user: NDArray[np.int64]) -> "PooledAuc":
        """Sort once. Arguments are [N]; users are 0..U-1 below 2^31, labels positive above 0, scores without NaN."""
        negative, ours = _sorted_pairs(score, label, user)
        return PooledAuc(
            negative_user=(negative & LOW).astype(np.int32),
            positive_user=(ours & LOW).astype(np.int32),
            low=np.searchsorted(negative, ours & ~LOW, "left"),
            high=np.searchsorted(negative, ours | LOW, "right"),
        )

    def of(self, weights: NDArray[np.int32]) -> Floats:
        """Return the AUC per resample.

        Cost: about a nanosecond per negative and resample. Sums of weights need some 20 of a number's 63 bits, so
        several resamples share one pass, each in bits of its own.
        """
        negatives = weights.astype(np.int64) @ np.bincount(self.negative_user, minlength=weights.shape[1])  # [R]
        bits = int(negatives.max(initial=0)).bit_length() + 1  # room for the sum of two running totals
        lanes = max(63 // bits, 1)
        total = np.zeros(len(self.negative_user) + 1, np.int64)
        drawn = np.empty(len(self.negative_user), np.int64)
        above = np.zeros(len(weights), np.int64)  # twice the pairs in order, ties counted once
        positives = np.zeros(len(weights), np.int64)
        for first in range(0, len(weights), lanes):
            group = weights[first : first + lanes].astype(np.int64)  # [L, U]
            shift = np.arange(len(group)) * bits
            packed = (group << shift[:, None]).sum(axis=0)
            np.take(packed, self.negative_user, out=drawn, mode="clip")  # "clip" writes straight into `out`
            np.cumsum(drawn, out=total[1:])
            beaten = total[self.low] + total[self.high]  # [positives]
            for row, weight in enumerate(group):
                own = weight[self.positive_user]
                above[first + row] = np.dot(own, (beaten >> shift[row]) & ((1 << bits) - 1))
                positives[first + row] = own.sum()
        return ratio(above.astype(np.float64), 2.0 * positives * negatives)

    def shares(self) -> Floats:
        """Return the candidates of each user, up to the last that has any."""
        owners = np.concatenate([self.negative_user, self.positive_user])
        return np.bincount(owners).astype(np.float64)


@dataclass(frozen=True)
class BinnedAuc:
    """The AUC over all candidates of all users, for more of them than `PooledAuc` can go through at every resample.

    Scores are cut into bins. Pairs across bins are counted exactly from each user's counts by bin, which is a matrix
    product. What pairs within a bin d_ij (0.5 in order, -0.5 out of order, 0 tied) add to half of their number is
    linear in how often its users were drawn, up to sum (w_i - 1)(w_j - 1) d_ij: the first-order term of their
    U-statistic (Hoeffding 1948). What is left out is about 2e-7 at a million candidates and 2e-8 at ten million, where
    the interval is 5,000 times as wide or more; nothing where every bin holds one score.
    """

    negatives: Floats  # [U, bins], ascending by score
    positives: Floats  # [U, bins]
    within: Floats  # [U], what a user's candidates add within their bins

    @staticmethod
    def build(
        score: NDArray[np.floating], label: NDArray[np.generic], user: NDArray[np.int64], users: int, bins: int = 64
    ) -> "BinnedAuc":
        """Sort once, and look every candidate up among those of the other class. Arguments as for `PooledAuc`."""
        negative, ours = _sorted_pairs(score, label, user)
        quantiles = [len(negative) * number // bins for number in range(1, bins)] if len(negative) else []
        edges = np.unique(negative[quantiles] & ~LOW)
        within = np.zeros(users)
        counts = []
        starts = [np.r_[0, np.searchsorted(one, edges), len(one)] for one in (negative, ours)]
        for one, other, start, end, sign in ((negative, ours, *starts, -1), (ours, negative, *starts[::-1], 1)):
            low, high = np.searchsorted(other, one & ~LOW, "left"), np.searchsorted(other, one | LOW, "right")
            place = np.repeat(np.arange(len(edges) + 1), np.diff(start))
            # Of the other class within the bin: half of those below, less half of those above.
            excess = 0.5 * (low + high - end[place] - end[place + 1])
            owner = (one & LOW).astype(np.int64)
            within += sign * np.bincount(owner, excess, users)
            cells = np.bincount(owner * (len(edges) + 1) + place, minlength=users * (len(edges) + 1))
            counts.append(cells.reshape(users, -1).astype(np.float64))
        return BinnedAuc(counts[0], counts[1], within)

    def of(self, weights: NDArray[np.int32]) -> Floats:
        """Return the AUC per resample. Cost: two products of [R, U] with [U, bins]."""
        drawn = weights.astype(np.float64)
        negatives, positives = drawn @ self.negatives, drawn @ self.positives  # [R, bins]
        below = np.cumsum(negatives, axis=1) - 0.5 * negatives
        # Each pair within a bin is in two users' sums, its positive's and its negative's.
        within = drawn @ self.within - 0.5 * self.within.sum()
        above = (positives * below).sum(axis=1) + within
        return ratio(above, positives.sum(axis=1) * negatives.sum(axis=1))

    def shares(self) -> Floats:
        """Return the candidates of each user."""
        return np.asarray(self.negatives.sum(axis=1) + self.positives.sum(axis=1))


def pooled_auc(
    score: NDArray[np.floating], label: NDArray[np.generic], user: NDArray[np.int64], users: int
) -> Statistic:
    """Return the pooled AUC of candidates [N]: exact at every resample up to `EXACT` of them, by bins above."""
    if len(score) <= EXACT:
        return PooledAuc.build(score, label, user)
    return BinnedAuc.build(score, label, user, users)


def _sorted_pairs(
    score: NDArray[np.floating], label: NDArray[np.generic], user: NDArray[np.int64]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return (score, user) of the negatives and of the positives, each as ascending 64-bit numbers, the user below.

    Sorted positives look up neighbouring places: 3x faster than in the order of the file.
    """
    pair = (ordered_bits(score).astype(np.uint64) << np.uint64(32)) | user.astype(np.uint64)
    positive = label.astype(bool)
    negative, ours = pair[~positive], pair[positive]
    negative.sort()
    ours.sort()
    return negative, ours


LEAST_USERS = 6
"""That an interval needs. A resample lies between the users it is drawn from: where all of n users differ in one
direction, as they do by chance 2^(1-n) of the time, no resample says otherwise. From 6 on that is less than 5 %."""


@dataclass(frozen=True)
class Basis:
    """The users an estimate rests on: how many, how many alike ones they are worth, and the freedom of their spread.

    Where a few users make up most of a statistic, resamples of them spread too little, as those of a handful of users
    would. With shares s of users whose own errors are alike, sum s e rests on (sum s)^2 / sum s^2 of them (Kish 1965),
    and their estimated variance has (sum s^2)^2 / sum s^4 degrees of freedom (Satterthwaite 1946).
    """

    users: int
    effective: float
    freedom: float

    @staticmethod
    def of(shares: Floats) -> "Basis":
        """Return the basis of a statistic made up by shares [U]."""
        scaled = shares / (shares.max(initial=0.0) or 1.0)
        square, fourth = float((scaled**2).sum()), float((scaled**4).sum())
        if not fourth:
            return Basis(0, 0.0, 0.0)
        return Basis(int(np.count_nonzero(shares)), float(scaled.sum()) ** 2 / square, square**2 / fourth)

    def tail(self, level: float) -> float:
        """Return the share of resamples to leave out at each end; `users` must be `LEAST_USERS` at least.

        The expanded percentile interval (Hesterberg, The American Statistician 69, 2015): it reaches as far as
        Student's t does, not the normal distribution, and makes up for resamples that vary (n - 1) / n too little.
        """
        from scipy.special import ndtr, stdtrit

        reach = np.sqrt(self.effective / max(self.effective - 1, 1e-9)) * stdtrit(self.freedom, 0.5 + level / 2)
        return float(ndtr(-reach))


@dataclass(frozen=True)
class Estimate:
    """A statistic on the users as they are, and on R resamples of them (float64 [R])."""

    value: float
    resampled: Floats
    basis: Basis

    @property
    def users(self) -> int:
        """How many users it depends on."""
        return self.basis.users

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the percentile interval (Efron 1979), expanded for few users (`Basis.tail`).

        NaN twice where fewer than two resamples define the statistic, or where it depends on fewer than `LEAST_USERS`.
        """
        known = self.resampled[~np.isnan(self.resampled)]
        if len(known) < 2 or self.users < LEAST_USERS:
            return float("nan"), float("nan")
        tail = self.basis.tail(level)
        low, high = np.quantile(known, [tail, 1 - tail])
        return float(low), float(high)

    def told(self, level: float = 0.95) -> Value:
        """Return the value with the ends of its interval, None in place of NaN: how they are written down."""
        value, low, high = (None if np.isnan(one) else float(one) for one in (self.value, *self.interval(level)))
        return value, low, high

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the paired difference; both must come from the same users, seed and number of resamples."""
        one, two = self.basis, other.basis
        basis = Basis(min(one.users, two.users), min(one.effective, two.effective), min(one.freedom, two.freedom))
        return Estimate(self.value - other.value, self.resampled - other.resampled, basis)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made: resamples of the users, level, and the seed of the draws."""

    resamples: int
    level: float
    seed: int


def bootstrap(statistics: Mapping[str, Statistic], users: int, resamples: int, seed: int) -> dict[str, Estimate]:
    """Estimate every statistic on the same resamples of the users.

    Args:
        statistics: by name, all over users 0..users-1.
        users: U.
        resamples: R.
        seed: of the draws; the same seed gives the same resamples whatever the statistics.
    """
    ones = np.ones((1, users), np.int32)
    parts: dict[str, list[Floats]] = {name: [] for name in statistics}
    for weights in _weights(users, resamples, seed):
        for name, statistic in statistics.items():
            parts[name].append(statistic.of(weights))
    return {
        name: Estimate(
            float(statistic.of(ones)[0]), np.concatenate([*parts[name], np.empty(0)]), Basis.of(statistic.shares())
        )
        for name, statistic in statistics.items()
    }


def _weights(users: int, resamples: int, seed: int) -> Iterator[NDArray[np.int32]]:
    """Yield int32 [r, U] at a time: how often each user was drawn in each resample."""
    step = max(CHUNK // max(users, 1), 1)
    for first in range(0, resamples if users else 0, step):
        yield np.stack(
            [
                np.bincount(generator(seed, index, "bootstrap").integers(0, users, users), minlength=users)
                for index in range(first, min(first + step, resamples))
            ]
        ).astype(np.int32)
