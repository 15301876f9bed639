"""Probabilities held against what happened: reliability of a model's scores, and maps that mend them.

Only answers that were really shown say how often what is shown is taken. A map is fitted on those of the validation
period and judged on those of the test period, beside the scores as they are, read as logits.

    K bins   N candidates   U users
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from pipelines.prepared import IMPRESSIONS, VALID_IMPRESSIONS, PreparedSet
from pipelines.scoring import draw_requests, score_sets
from ranking.calibration import Calibration, Floats, Method
from ranking.ranker import AnyRanker
from recsys.bootstrap import CalibrationError, Ratio, Resampling, Statistic, Value, bootstrap, equal_bins
from recsys.errors import DataError

METHODS: tuple[Method, ...] = get_args(Method)
BINS = 10
LEAST_TAKEN = 20
"""Items taken, and not taken, that a map is fitted on at least."""


@dataclass(frozen=True)
class Shown:
    """N items that were shown: score float32 [N], whether it was taken bool [N], and whose answer int64 [N], 0..U-1."""

    score: NDArray[np.float32]
    taken: NDArray[np.bool_]
    user: NDArray[np.int64]
    users: int


@dataclass(frozen=True)
class Bin:
    """About a tenth of what was shown, by probability: what was said of it, and the share that was taken."""

    shown: int
    probability: float
    rate: float | None
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class Reading:
    """How far probabilities lie from what happened."""

    ece: Value
    logloss: Value
    bins: list[Bin]


@dataclass(frozen=True)
class Reliability:
    """A model's scores as probabilities: as they are, and by each map that could be fitted.

    Attributes:
        readings: `none` (scores as logits), then by method.
        answers: of the validation period that maps were fitted on; 0 if none could be.
        why: why a map is missing; empty if none is.
    """

    readings: dict[str, Reading]
    answers: int = 0
    why: str = ""


def fit_scores(method: Method, score: NDArray[np.floating], label: NDArray[np.generic], answers: int) -> Calibration:
    """Fit a map on scores [N] and labels [N] of `answers` answers.

    Platt's targets are (t + 1) / (t + 2) for the t items taken and 1 / (n + 2) for the n others; an isotonic map keeps
    within the same bounds, since no number of examples makes a probability 0 or 1.

    Raises:
        DataError: too few of either class, or higher scores were taken no more often than lower ones.
    """
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression

    x, taken = score.astype(np.float64), label.astype(bool)
    positives, negatives = int(taken.sum()), int((~taken).sum())
    if min(positives, negatives) < LEAST_TAKEN:
        raise DataError(
            f"{positives} items taken and {negatives} not taken among what was shown in {answers} answers; a "
            f"calibration needs at least {LEAST_TAKEN} of each: collect more, or publish without `--calibration`"
        )
    counts = {"answers": answers, "shown": len(x)}
    low, high = 1 / (negatives + 2), (positives + 1) / (positives + 2)
    if method == "isotonic":
        fitted = IsotonicRegression(y_min=low, y_max=high).fit(x, taken)
        knots, levels = fitted.X_thresholds_.tolist(), fitted.y_thresholds_.tolist()
        return Calibration(method=method, score=knots, probability=levels, **counts)
    target = np.where(taken, high, low)
    middle, scale = float(x.mean()), float(x.std()) or 1.0
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.tile((x - middle) / scale, 2)[:, None],
        np.repeat([1, 0], len(x)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope = float(model.coef_[0, 0]) / scale
    if slope <= 0:
        raise DataError(
            f"what scores higher was taken no more often in {answers} answers (slope {slope:.3g}); a monotone map "
            "cannot mend that: look at the model, or publish without `--calibration`"
        )
    return Calibration(method=method, slope=slope, intercept=float(model.intercept_[0]) - slope * middle, **counts)


def fit_calibration(
    method: Method, model: AnyRanker, prepared: PreparedSet, most: int = 20_000, seed: int = 2023
) -> Calibration:
    """Fit a map for a model on what was shown in the validation period, `most` answers drawn by seed.

    Raises:
        DataError: no such answers, or too few (see `fit_scores`).
    """
    score, label, answers = _validation(model, prepared, most, seed)
    return fit_scores(method, score, label, answers)


def reliability_of(
    model: AnyRanker, prepared: PreparedSet, shown: Shown, resampling: Resampling, most: int
) -> Reliability:
    """Hold a model's probabilities against what was taken, before and after each map.

    Args:
        model: whose scores.
        prepared: the set; what was shown in its validation period is what maps are fitted on.
        shown: what maps are judged on, in the test period.
        resampling: of the users, for intervals.
        most: answers of the validation period that are scored.
    """
    logit = shown.score.astype(np.float64)
    probabilities = {"none": np.exp(-np.logaddexp(0.0, -logit))}
    maps: dict[str, Calibration] = {}
    answers, whys = 0, []
    try:
        score, label, answers = _validation(model, prepared, most, resampling.seed)
    except DataError as error:
        whys.append(str(error))
    for method in METHODS if answers else ():
        try:
            maps[method] = fit_scores(method, score, label, answers)
        except DataError as error:
            whys.append(str(error))
    probabilities |= {method: one.of(shown.score) for method, one in maps.items()}
    readings = {name: _reading(probability, shown, resampling) for name, probability in probabilities.items()}
    return Reliability(readings, answers if maps else 0, "; ".join(dict.fromkeys(whys)))


def _validation(
    model: AnyRanker, prepared: PreparedSet, most: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8], int]:
    """Return scores and labels of what was shown in the validation period, and the number of answers."""
    sample = draw_requests(prepared, VALID_IMPRESSIONS, most, seed)
    sets = prepared.candidates(VALID_IMPRESSIONS, IMPRESSIONS).take(sample.index)
    return score_sets(model, prepared, sample, sets), sets.label, len(sample)


def _reading(probability: Floats, shown: Shown, resampling: Resampling) -> Reading:
    label, user, users, level = shown.taken, shown.user, shown.users, resampling.level
    place = equal_bins(probability, BINS)
    parts = [np.flatnonzero(place == number) for number in np.unique(place)]
    bounded = np.clip(probability, np.finfo(np.float64).tiny, 1 - np.finfo(np.float64).epsneg)
    loss = -np.where(label, np.log(bounded), np.log1p(-bounded))
    statistics: dict[str, Statistic] = {
        "ece": CalibrationError.build(probability, label, user, users),
        "logloss": Ratio.of_groups(loss, user, users),
    }
    statistics |= {
        str(number): Ratio.of_groups(label[part].astype(np.float64), user[part], users)
        for number, part in enumerate(parts)
    }
    found = bootstrap(statistics, users, resampling.resamples, resampling.seed)
    bins = [
        Bin(len(part), float(probability[part].mean()), *found[str(number)].told(level))
        for number, part in enumerate(parts)
    ]
    return Reading(found["ece"].told(level), found["logloss"].told(level), bins)
