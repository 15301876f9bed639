"""What is measured on scored candidates, as statistics that can be resampled by user.

Segments. `history_<from>_<to>` holds the requests with that many events before them (the whole history, whatever a
model reads). Two segments hold all requests but only some of their candidates, because a sampled negative is seldom
something the user chose before and "it is in the history" alone already tells many positives from negatives:

    target_in_history         the positives found in the request's history, against its negatives outside the history
    target_outside_history    the positives outside the history, against the same negatives: "AUC on candidates outside
                              the history"
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation import (
    ALL_ITEMS,
    INSIDE,
    NOT_DEFINED,
    OUTSIDE,
    Agreement,
    CandidateFacts,
    Comparison,
    EvaluateConfig,
    Metrics,
    SegmentFacts,
    defined,
    length_segments,
)
from pipelines.prepared import IMPRESSIONS, CandidateSets
from pipelines.scoring import Sample
from pipelines.segments import Segment
from recsys.bootstrap import CalibrationError, Estimate, Ratio, Statistic, pooled_auc
from recsys.metrics import Floats, Ints, Ranking, auc, hit_rate, mean, mrr, ndcg, rank, recall

CUTOFFS: dict[str, tuple[Callable[[Ranking, int], Floats], int]] = {
    "ndcg_at_10": (ndcg, 10),
    "mrr_at_10": (mrr, 10),
    "hit_rate_at_10": (hit_rate, 10),
    "recall_at_10": (recall, 10),
    "recall_at_50": (recall, 50),
}
DEPTH = 50  # deepest cutoff
COMPARED = ("gauc", "auc", "ndcg_at_10", f"segment/{OUTSIDE}/gauc", f"segment/{OUTSIDE}/auc")
COMPARED_ALL_ITEMS = ("ndcg_at_10", "recall_at_50")


@dataclass(frozen=True)
class Pool:
    """The candidates of one sampler for the chosen requests, and what is known of each."""

    sample: Sample
    sets: CandidateSets
    request: Ints  # [N]
    inside: NDArray[np.bool_]  # [N], found in the request's history

    def facts(self) -> CandidateFacts:
        """Return what is printed beside every AUC on these candidates."""
        positive, requests = self.sets.label > 0, len(self.sample)
        return CandidateFacts(
            requests=requests,
            users=len(np.unique(self.sample.requests.user)),
            candidates=len(positive),
            positives_per_request=float(positive.sum() / requests),
            negatives_per_request=float((~positive).sum() / requests),
            positives_in_history=share(self.inside[positive]),
            negatives_in_history=share(self.inside[~positive]),
        )


@dataclass(frozen=True)
class Result:
    """What one model got on one kind of candidates: statistics over `users` users, and plain counts."""

    statistics: dict[str, Statistic]
    counts: dict[str, float]
    users: int


def on_candidates(
    pool: Pool, score: NDArray[np.float32], config: EvaluateConfig, segments: Sequence[Segment] = ()
) -> Result:
    """Return everything measured on one sampler's candidates: over all of them, and by segment.

    Of the further `segments` only means over users and requests are taken: the pooled AUC's resamples cost more.
    """
    label, inside = pool.sets.label > 0, pool.inside
    users, user = np.unique(pool.sample.requests.user, return_inverse=True)
    everything = np.ones(len(label), np.bool_)
    length = pool.sample.length[pool.request]
    parts: dict[str, tuple[NDArray[np.bool_], tuple[str, ...]]] = {"": (everything, tuple(CUTOFFS))}
    for name, low, high in length_segments(config.history_edges):
        kept = (length >= low) & (everything if high is None else length < high)
        parts[f"segment/{name}/"] = (kept, ("ndcg_at_10",))
    parts[f"segment/{INSIDE}/"] = (inside == label, ())
    parts[f"segment/{OUTSIDE}/"] = (~inside, ())
    statistics: dict[str, Statistic] = {}
    counts: dict[str, float] = {}
    for prefix, (kept, cutoffs) in parts.items():
        if not kept.any():
            continue
        request = pool.request[kept]
        part = _measure(score[kept], label[kept], request, user, len(users), cutoffs)
        statistics |= {prefix + name: statistic for name, statistic in part.statistics.items()}
        counts |= {prefix + name: value for name, value in part.counts.items()}
    if config.split == IMPRESSIONS:
        statistics |= _of_probabilities(score, label, user[pool.request], len(users))
    for segment in segments:
        kept = segment.kept(pool.request, pool.sets.item, label)
        if (label & kept).any():
            part = segment_result(score[kept], label[kept], pool.request[kept], user, len(users))
            statistics |= {f"segment/{segment.name}/{name}": value for name, value in part.statistics.items()}
            counts |= {f"segment/{segment.name}/{name}": value for name, value in part.counts.items()}
    return Result(statistics, counts, len(users))


def _of_probabilities(
    score: NDArray[np.float32], label: NDArray[np.bool_], user: Ints, users: int
) -> dict[str, Statistic]:
    """Return log loss and calibration error of scores read as logits; `user` int64 [N] says whose each candidate is."""
    logit = score.astype(np.float64)
    loss = np.logaddexp(0.0, np.where(label, -logit, logit))
    probability = np.exp(-np.logaddexp(0.0, -logit))
    return {
        "logloss": Ratio.of_groups(loss, user, users),
        "ece": CalibrationError.build(probability, label, user, users),
    }


def segment_facts(pool: Pool, segment: Segment) -> SegmentFacts:
    """Count what a segment holds."""
    label = pool.sets.label > 0
    kept = segment.kept(pool.request, pool.sets.item, label)
    request = np.unique(pool.request[kept])
    users = len(np.unique(pool.sample.requests.user[request]))
    return SegmentFacts(segment.name, segment.kind, segment.words, len(request), users, int((label & kept).sum()))


def segment_result(
    score: NDArray[np.float32], label: NDArray[np.bool_], request: Ints, user: Ints, users: int
) -> Result:
    """Return GAUC and NDCG@10 of some candidates; `user` int64 [R] says whose each request is."""
    by_request = rank(score, label, request, len(user))
    by_user = rank(score, label, user[request], users)
    of_user = auc(by_user)
    statistics: dict[str, Statistic] = {
        "gauc": Ratio.of_groups(of_user, np.arange(users), users, by_user.candidates.astype(np.float64)),
        "ndcg_at_10": Ratio.of_groups(ndcg(by_request, 10), user, users),
    }
    counts = _counts(by_request, user) | {"gauc.skipped": _skipped(of_user, by_user)}
    return Result(statistics, counts, users)


def _measure(
    score: NDArray[np.float32],
    label: NDArray[np.bool_],
    request: Ints,
    user: Ints,
    users: int,
    cutoffs: tuple[str, ...],
) -> Result:
    """Return the metrics of some candidates; `user` int64 [R] says whose each request is."""
    by_request = rank(score, label, request, len(user))
    by_user = rank(score, label, user[request], users)
    of_request, of_user = auc(by_request), auc(by_user)
    statistics: dict[str, Statistic] = {
        "auc": pooled_auc(score, label, user[request], users),
        "gauc": Ratio.of_groups(of_user, np.arange(users), users, by_user.candidates.astype(np.float64)),
        "auc_per_request": Ratio.of_groups(of_request, user, users),
    }
    counts = _counts(by_request, user) | {
        "gauc.skipped": _skipped(of_user, by_user),
        "auc_per_request.skipped": _skipped(of_request, by_request),
    }
    for name in cutoffs:
        formula, k = CUTOFFS[name]
        values = formula(by_request, k)
        statistics[name] = Ratio.of_groups(values, user, users)
        counts[f"{name}.skipped"] = _skipped(values, by_request)
    return Result(statistics, counts, users)


def on_all_items(ranking: Ranking, ranked: Sample) -> Result:
    """Return everything measured on a ranking of all items."""
    users, user = np.unique(ranked.requests.user, return_inverse=True)
    statistics: dict[str, Statistic] = {}
    counts = _counts(ranking, user)
    for name, (formula, k) in CUTOFFS.items():
        values = formula(ranking, k)
        statistics[name] = Ratio.of_groups(values, user, len(users))
        counts[f"{name}.skipped"] = _skipped(values, ranking)
    return Result(statistics, counts, len(users))


def _counts(by_request: Ranking, user: Ints) -> dict[str, float]:
    present = by_request.candidates > 0
    return {"n_requests": float(present.sum()), "n_users": float(len(np.unique(user[present])))}


def _skipped(values: Floats, ranking: Ranking) -> float:
    """Count the groups that have candidates but not what the metric needs (both classes, or a positive)."""
    return float(np.isnan(values[ranking.candidates > 0]).sum())


def named(config: EvaluateConfig, found: Mapping[str, Estimate], counts: Mapping[str, float], sampler: str) -> Metrics:
    """Return the flat names of `metrics.json`."""
    values: Metrics = {f"{config.split}/{name}": value for name, value in counts.items()}
    for name, estimate in found.items():
        key = f"{config.split}/{name}"
        values[key], values[f"{key}.ci_low"], values[f"{key}.ci_high"] = estimate.told(config.level)
    if sampler != ALL_ITEMS:
        for name in NOT_DEFINED:
            values.setdefault(f"{config.split}/{name}", None)
    return values


def compare(estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]], config: EvaluateConfig) -> list[Comparison]:
    """Return the paired difference of every two models in every compared metric that both define."""
    found = [
        _difference(sampler, metric, (model, ours[metric]), (other, estimates[other][sampler][metric]), config)
        for model, other in combinations(estimates, 2)
        for sampler, ours in estimates[model].items()
        for metric in (COMPARED_ALL_ITEMS if sampler == ALL_ITEMS else COMPARED)
        if metric in ours
    ]
    return [comparison for comparison in found if not np.isnan(comparison.difference)]


def against_champion(
    estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    segments: Sequence[SegmentFacts],
    champion: str,
    config: EvaluateConfig,
) -> list[Comparison]:
    """Return every other model's paired difference from the champion, by segment, on the first sampler's candidates."""
    sampler = config.samplers[0]
    ours = estimates[champion][sampler]
    names = [f"segment/{segment.name}/gauc" for segment in segments]
    found = [
        _difference(sampler, name, (model, one[sampler][name]), (champion, ours[name]), config)
        for model, one in estimates.items()
        for name in names
        if model != champion and name in ours
    ]
    return [comparison for comparison in found if not np.isnan(comparison.difference)]


def agreement(scored: Mapping[str, Mapping[str, Floats]], full: Mapping[str, Floats]) -> list[Agreement]:
    """Say how far sampled candidates rank the models as the full ranking does, by NDCG@10 on the same requests.

    Args:
        scored: by sampler, then model: NDCG@10 of each of those requests on the sampler's candidates.
        full: by model: NDCG@10 of each of them in the full ranking.
    """
    from scipy.stats import kendalltau

    found = []
    for sampler, by_model in scored.items():
        one, other = ([mean(values[name]) for name in full] for values in (by_model, full))
        tau = float(kendalltau(one, other).statistic) if len(full) > 1 else float("nan")
        requests = len(next(iter(full.values()), np.empty(0)))
        found.append(Agreement(sampler, "ndcg_at_10", requests, len(full), defined(tau)))
    return found


def _difference(
    sampler: str, metric: str, first: tuple[str, Estimate], second: tuple[str, Estimate], config: EvaluateConfig
) -> Comparison:
    difference = first[1].minus(second[1])
    low, high = difference.interval(config.level)
    known = difference.resampled[~np.isnan(difference.resampled)]
    return Comparison(
        sampler=sampler,
        metric=f"{config.split}/{metric}",
        model=first[0],
        other=second[0],
        difference=difference.value,
        ci_low=defined(low),
        ci_high=defined(high),
        share_better=float((np.sign(known) + 1).mean() / 2) if len(known) else None,
    )


def share(flags: NDArray[np.bool_]) -> float:
    """Return the share of True, 0 of nothing."""
    return float(flags.mean()) if len(flags) else 0.0
