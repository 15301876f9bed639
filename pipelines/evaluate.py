"""Offline evaluation: the same requests, candidates and resamples of the users for every model.

For each sampler the fixed candidates of a split are scored, and for a smaller fixed sample of requests all known items
are ranked. Every value comes with an interval by resampling users, and beside it stands what it was measured on.
`pipelines/measures.py` says what is measured, `pipelines/evaluation.py` how it is written down.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from pipelines.attention import measure_attention
from pipelines.attention_record import AttentionFound
from pipelines.calibration import Reliability, Shown, reliability_of
from pipelines.cold_start import measure_cold_start
from pipelines.evaluation import (
    ALL_ITEMS,
    CandidateFacts,
    Cost,
    EvaluateConfig,
    Evaluation,
    Metrics,
    TrainingSummary,
    length_segments,
)
from pipelines.measures import (
    DEPTH,
    Pool,
    against_champion,
    agreement,
    compare,
    named,
    on_all_items,
    on_candidates,
    segment_facts,
    share,
)
from pipelines.prepared import IMPRESSIONS, CandidateSets, PreparedSet, Split
from pipelines.scoring import (
    Sample,
    choose,
    distinct_items,
    draw_requests,
    in_history,
    is_retriever,
    join_sets,
    matched,
    rank_all_items,
    score_sets,
)
from pipelines.segments import Segment, segments_of
from ranking.batch import FIRST_ITEM
from ranking.ranker import AnyRanker
from recsys.bootstrap import Estimate, Resampling, bootstrap
from recsys.errors import ConfigError, DataError
from recsys.metrics import auc, gauc, groups_of, mean, ndcg, rank, recall
from recsys.progress import Progress, silent, titled

__all__ = ["EvaluateConfig", "Evaluation", "TrainingSummary", "evaluate", "validate"]

RECORD = "requests"
"""What the kept predictions call the record of what was asked; each model's own are called as it is."""
SINGLE_REQUESTS = 20
"""Requests scored one by one for the median time of one."""


def evaluate(
    models: Mapping[str, AnyRanker],
    prepared: PreparedSet,
    config: EvaluateConfig,
    progress: Progress = silent,
) -> Evaluation:
    """Score every model on the same requests and say how good each is, how surely, and at what cost.

    Args:
        models: by name, each on its own device; evaluated in evaluation mode and left in the mode they were in.
        prepared: the set to evaluate on.
        config: what, and how much of it.
        progress: called while requests are being scored.

    Raises:
        ConfigError: a model is called `requests`.
        DataError: the split has no requests, candidates are missing, or a model gives NaN.

    Cost: one pass of each model over the candidates, plus about `resamples` nanoseconds per negative for the intervals.
    """
    for name in models:
        refuse_name(name)
    chosen = draw_requests(prepared, config.split, config.max_requests, config.seed)
    if not len(chosen):
        raise DataError(f"{prepared.directory}: split {config.split!r} has no requests; prepare a longer period")
    few = choose(len(chosen), config.full_ranking_requests, config.seed, "evaluate/full ranking")
    pools = {name: _pool(prepared, chosen, config.split, name) for name in config.samplers}
    main = pools[config.samplers[0]]
    segments = segments_of(prepared, chosen, main.request, main.sets.item, config.segments)
    task = _Task(prepared, config, chosen, chosen.take(few), few, pools, segments)
    champion = _champion(models, config)
    found = {name: _judge(name, model, task, progress) for name, model in models.items()}
    facts = {name: pool.facts() for name, pool in pools.items()}
    facts[ALL_ITEMS] = _all_items_facts(prepared, task.ranked)
    told = [segment_facts(main, segment) for segment in segments]
    estimates = {name: one.estimates for name, one in found.items()}
    champion = champion or _highest(estimates, config.samplers[0])
    comparisons = compare(estimates, config)
    if champion is not None:
        comparisons += against_champion(estimates, told, champion, config)
    return Evaluation(
        split=config.split,
        data_digest=prepared.digest,
        config=config,
        n_requests=len(chosen),
        n_users=len(np.unique(chosen.requests.user)),
        candidates=facts,
        metrics={name: one.metrics for name, one in found.items()},
        comparisons=comparisons,
        cost={name: one.cost for name, one in found.items()},
        cold_start=measure_cold_start(models, prepared, config, progress) if config.cold_requests else None,
        segments=told,
        agreement=agreement(
            {sampler: {name: one.sampled_ndcg[sampler] for name, one in found.items()} for sampler in pools},
            {name: one.full_ndcg for name, one in found.items()},
        ),
        attention=_attention(models, task, found),
        reliability={name: one.reliability for name, one in found.items() if one.reliability is not None},
        predictions={RECORD: _requests_record(task), **{name: one.predictions for name, one in found.items()}},
    )


def refuse_name(name: str) -> None:
    """Raise `ConfigError` for a run's name under which its scores would overwrite the record of what was asked."""
    if name == RECORD:
        raise ConfigError(f"a run called {name!r}: the kept predictions call what was asked so; give it another name")


def validate(
    model: AnyRanker,
    prepared: PreparedSet,
    split: Split = "valid",
    sampler: str = "uniform",
    max_requests: int = 1000,
    seed: int = 2023,
) -> dict[str, float]:
    """Return the metrics a training loop watches, without intervals; the same requests at every call.

    `gauc`, `auc`, `auc_per_request` and `ndcg_at_10` are on the sampler's candidates. A retriever also gets
    `ndcg_at_20` and `recall_at_20` over all known items, by the inner product of its vectors. NaN where not defined.
    """
    chosen = draw_requests(prepared, split, max_requests, seed)
    sets = prepared.candidates(split, sampler).take(chosen.index)
    scores = matched(score_sets(model, prepared, chosen, sets), sets.item, prepared, sampler)
    request = groups_of(sets.offsets)
    users, user = np.unique(chosen.requests.user, return_inverse=True)
    by_request = rank(scores, sets.label, request, len(chosen))
    values = {
        "gauc": gauc(rank(scores, sets.label, user[request], len(users))),
        "auc": float(auc(rank(scores, sets.label))[0]),
        "auc_per_request": mean(auc(by_request)),
        "ndcg_at_10": mean(ndcg(by_request, 10)),
    }
    if is_retriever(model):
        ranking = rank_all_items(model, prepared, chosen, depth=20, by_vectors=True)
        values |= {"ndcg_at_20": mean(ndcg(ranking, 20)), "recall_at_20": mean(recall(ranking, 20))}
    return values


@dataclass(frozen=True)
class _Task:
    """What every model is asked: the chosen requests, those to rank all items for, and the candidates by sampler."""

    prepared: PreparedSet
    config: EvaluateConfig
    chosen: Sample
    ranked: Sample
    few: NDArray[np.int64]  # where the requests of `ranked` lie among the chosen
    pools: dict[str, Pool]
    segments: list[Segment]  # of the first sampler's candidates


@dataclass(frozen=True)
class _Judged:
    """What one model answered, by sampler (or `all_items`)."""

    metrics: dict[str, Metrics]
    estimates: dict[str, dict[str, Estimate]]
    cost: Cost
    predictions: dict[str, Any]
    sampled_ndcg: dict[str, NDArray[np.float64]]  # by sampler: NDCG@10 of the requests all items are ranked for
    full_ndcg: NDArray[np.float64]  # of the same requests among all items
    reliability: Reliability | None  # None without impressions


def _champion(models: Mapping[str, AnyRanker], config: EvaluateConfig) -> str | None:
    if config.champion is not None and config.champion not in models:
        raise ConfigError(f"champion is {config.champion!r}; expected one of the models, {', '.join(models)}")
    return config.champion


def _highest(estimates: Mapping[str, Mapping[str, Mapping[str, Estimate]]], sampler: str) -> str | None:
    values = {name: found[sampler]["gauc"].value for name, found in estimates.items()}
    known = {name: value for name, value in values.items() if not np.isnan(value)}
    return max(known, key=lambda name: known[name]) if known else None


def _judge(name: str, model: AnyRanker, task: _Task, progress: Progress) -> _Judged:
    """Score one model on everything; a history is encoded once for the candidates of all samplers."""
    config, chosen, ranked = task.config, task.chosen, task.ranked
    joined, places = join_sets([pool.sets for pool in task.pools.values()])
    told = titled(progress, f"{name}: scoring candidates")
    started = time.perf_counter()
    scores = score_sets(model, task.prepared, chosen, joined, config.batch_requests, told)
    cost = _cost(model, time.perf_counter() - started, chosen, joined, _single_ms(model, task))
    predictions: dict[str, Any] = {
        sampler: matched(scores[place], pool.sets.item, task.prepared, sampler)
        for (sampler, pool), place in zip(task.pools.items(), places, strict=True)
    }
    results = {
        sampler: on_candidates(
            pool, predictions[sampler], config, task.segments if sampler == config.samplers[0] else ()
        )
        for sampler, pool in task.pools.items()
    }
    sampled = {
        sampler: ndcg(rank(predictions[sampler], pool.sets.label, pool.request, len(chosen)), 10)[task.few]
        for sampler, pool in task.pools.items()
    }
    told = titled(progress, f"{name}: ranking all items")
    ranking = rank_all_items(model, task.prepared, ranked, DEPTH, config.batch_requests, progress=told)
    results[ALL_ITEMS] = on_all_items(ranking, ranked)
    predictions |= {f"{ALL_ITEMS}.{key}": getattr(ranking, key) for key in ("group", "start", "size", "positive")}
    estimates = {
        sampler: bootstrap(result.statistics, result.users, config.resamples, config.seed)
        for sampler, result in results.items()
    }
    metrics = {
        sampler: named(config, estimates[sampler], result.counts, sampler) for sampler, result in results.items()
    }
    reliability = _reliability(model, task, predictions[IMPRESSIONS]) if IMPRESSIONS in task.pools else None
    return _Judged(metrics, estimates, cost, predictions, sampled, ndcg(ranking, 10), reliability)


def _attention(models: Mapping[str, AnyRanker], task: _Task, found: Mapping[str, _Judged]) -> AttentionFound | None:
    """Measure attention on some of the requests, with the first sampler's candidates."""
    config, pool = task.config, task.pools[task.config.samplers[0]]
    if not config.attention_requests:
        return None
    few = choose(len(task.chosen), config.attention_requests, config.seed, "evaluate/attention")
    kept = np.isin(pool.request, few)
    scores = {name: one.predictions[config.samplers[0]][kept] for name, one in found.items()}
    return measure_attention(
        models,
        task.prepared,
        task.chosen.take(few),
        pool.sets.take(few),
        scores,
        length_segments(config.history_edges),
        Resampling(config.resamples, config.level, config.seed),
    )


def _reliability(model: AnyRanker, task: _Task, score: NDArray[np.float32]) -> Reliability:
    config, pool = task.config, task.pools[IMPRESSIONS]
    users, user = np.unique(task.chosen.requests.user, return_inverse=True)
    shown = Shown(score, pool.sets.label > 0, user[pool.request], len(users))
    resampling = Resampling(config.resamples, config.level, config.seed)
    return reliability_of(model, task.prepared, shown, resampling, config.max_requests)


def _pool(prepared: PreparedSet, chosen: Sample, split: Split, sampler: str) -> Pool:
    sets = prepared.candidates(split, sampler)
    if len(chosen) and chosen.index[-1] >= len(sets):
        raise DataError(
            f"{prepared.directory}: {len(sets)} candidate lists of sampler {sampler!r}, but split {split!r} has "
            f"request {chosen.index[-1]}; prepare the set again"
        )
    taken = sets.take(chosen.index)
    return Pool(chosen, taken, groups_of(taken.offsets), in_history(prepared, chosen, taken))


def _all_items_facts(prepared: PreparedSet, ranked: Sample) -> CandidateFacts:
    requests, rows = ranked.requests, len(prepared.items) - FIRST_ITEM
    positives = CandidateSets(requests.offsets, requests.positive, np.ones(len(requests.positive), np.uint8))
    inside = in_history(prepared, ranked, positives)
    negatives = rows * len(ranked) - len(inside)
    touched = int(distinct_items(prepared, ranked).sum() - inside.sum())
    return CandidateFacts(
        requests=len(ranked),
        users=len(np.unique(requests.user)),
        candidates=rows * len(ranked),
        positives_per_request=len(inside) / len(ranked),
        negatives_per_request=negatives / len(ranked),
        positives_in_history=share(inside),
        negatives_in_history=touched / negatives if negatives else 0.0,
    )


def _requests_record(task: _Task) -> dict[str, NDArray[Any]]:
    """Return what was scored, in the order of every model's scores."""
    chosen = task.chosen
    record: dict[str, NDArray[Any]] = {
        "index": chosen.index,
        "user": chosen.requests.user,
        "at": chosen.requests.at,
        "history_length": chosen.length,
        f"{ALL_ITEMS}.index": task.ranked.index,
    }
    for name, pool in task.pools.items():
        sets = pool.sets
        record |= {f"{name}.offsets": sets.offsets, f"{name}.item": sets.item, f"{name}.label": sets.label}
        record[f"{name}.in_history"] = pool.inside.astype(np.uint8)
    return record


def _single_ms(model: AnyRanker, task: _Task) -> float:
    """Return the median milliseconds of a request scored alone, after one to warm up."""
    sets = task.pools[task.config.samplers[0]].sets
    places = choose(len(task.chosen), SINGLE_REQUESTS + 1, task.config.seed, "evaluate/single requests")
    seconds = []
    for place in places:
        one = np.array([place])
        sample, candidates = task.chosen.take(one), sets.take(one)
        started = time.perf_counter()
        score_sets(model, task.prepared, sample, candidates)
        seconds.append(time.perf_counter() - started)
    return float(1000 * np.median(seconds[1:] or seconds))


def _cost(model: AnyRanker, seconds: float, chosen: Sample, sets: CandidateSets, single_ms: float) -> Cost:
    assert isinstance(model, nn.Module)
    return Cost(
        seconds=seconds,
        requests=len(chosen),
        candidates=len(sets.item),
        ms_per_request=1000 * seconds / len(chosen),
        device=str(model.items.count.device),
        p50_ms=single_ms,
        bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
    )
