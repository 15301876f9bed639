"""Comparing models on the same requests and candidates: what decides is named beforehand, the rest is exploratory.

One primary metric over all requests decides, and at most five segments named beforehand, each at a level that keeps the
chance of any false word among them about two models at that of one (Bonferroni). Verdicts on further pairs add their
own chances: of seven equal models some pair differs by luck. Everything else in the output is marked exploratory.
Nothing is trained here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines import verdicts
from pipelines.compare_runs import Subject
from pipelines.evaluation import EvaluateConfig
from pipelines.measures import Pool, on_candidates
from pipelines.predictions import Predictions, same_data, same_questions, saved_predictions
from pipelines.prepared import PreparedSet, Requests
from pipelines.scoring import Sample, draw_requests, in_history, matched, score_sets
from pipelines.segments import Segment, SegmentsConfig, segments_of
from pipelines.verdicts import Question, Rule, Verdict
from ranking.ranker import AnyRanker
from recsys.bootstrap import Estimate, bootstrap
from recsys.errors import ConfigError, DataError
from recsys.files import write_json
from recsys.metrics import groups_of
from recsys.progress import Progress, silent

FORMAT = 1
OF_TARGETS = ("target_in_history", "target_outside_history")
"""Segments that any set may have, and may have nothing in."""
MOST_SEGMENTS = 5
Metric = Literal["gauc", "auc", "auc_per_request", "ndcg_at_10", "mrr_at_10", "hit_rate_at_10", "recall_at_10"]
SEGMENT_METRIC = "gauc"


@dataclass(frozen=True)
class CompareConfig:
    """What decides between models, named before anybody looks.

    Attributes:
        split: requests to compare on.
        sampler: candidates to compare on.
        metric: the primary metric: the verdict is about it, over all requests.
        segments: at most five, e.g. `target_outside_history` or `popularity_tail`: for whom a verdict is given too
            (on GAUC). All others are exploratory.
        max_requests: most requests scored, drawn by seed.
        resamples: of the users.
        level: of the verdicts' intervals.
        power: chance to tell a true difference apart that "users needed" is reckoned for.
        least_seeds: runs per method that a verdict on methods wants.
        history_edges: lengths at which the history segments start anew.
        seed: of the requests drawn and of the resamples.
    """

    split: Literal["valid", "test"] = "test"
    sampler: str = "uniform"
    metric: Metric = "gauc"
    segments: tuple[str, ...] = ()
    max_requests: int = 20_000
    resamples: int = 1000
    level: float = 0.95
    power: float = 0.8
    least_seeds: int = 5
    history_edges: tuple[int, ...] = (50, 200, 500, 1000)
    seed: int = 2023

    def __post_init__(self) -> None:
        if len(self.segments) > MOST_SEGMENTS:
            raise ConfigError(
                f"[compare] segments names {len(self.segments)}; at most {MOST_SEGMENTS} can decide, the others are "
                "shown as exploratory all the same"
            )
        if len(set(self.segments)) < len(self.segments):
            raise ConfigError(f"[compare] segments = {list(self.segments)}; expected each once")
        if self.least_seeds < 2 or self.resamples < 100 or self.max_requests < 1:
            raise ConfigError(
                f"[compare] least_seeds = {self.least_seeds}, resamples = {self.resamples}, max_requests = "
                f"{self.max_requests}; expected at least 2, 100 and 1"
            )
        if not (0 < self.level < 1 and 0 < self.power < 1):
            raise ConfigError(f"[compare] level = {self.level}, power = {self.power}; expected shares between 0 and 1")


@dataclass(frozen=True)
class CompareFile:
    """A comparison as its TOML states it: [compare] and [segments]."""

    compare: CompareConfig = field(default_factory=CompareConfig)
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        methods: the runs of each method, by the name of its first run; runs whose method is not known stand alone.
        values: run -> metric or `segment/<name>/gauc` -> value (None: not defined).
        primary: verdicts on the primary metric over all requests: on pairs of files of different methods, or on methods
            where a method has several runs.
        twins: verdicts on pairs of files of one method.
        segments: the same as `primary` for the segments named beforehand.
        exploratory: the same for all other segments, at the plain level: something to look into, not to decide on.
        not_defined: segments without a positive.
        agrees: share of twin pairs that come out "cannot tell"; None without twins.
    """

    config: CompareConfig
    data_digest: str
    requests: int
    users: int
    methods: dict[str, list[str]]
    values: dict[str, dict[str, float | None]]
    primary: list[Verdict]
    twins: list[Verdict]
    segments: list[Verdict]
    exploratory: list[Verdict]
    not_defined: list[str]
    agrees: float | None

    def table(self) -> dict[str, Any]:
        """Return the comparison as plain values, for JSON."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, directory: Path) -> None:
        """Write `compare.json`."""
        write_json(directory / "compare.json", self.table())


def compare(
    found: Sequence[Subject], prepared: PreparedSet, file: CompareFile, progress: Progress = silent
) -> Compared:
    """Score every subject on the same requests and say which is better.

    Raises:
        DataError: subjects of other data (both named), or kept scores that lack requests, hold other candidates or NaN.
        ConfigError: a segment that this set does not have; the message names those it has.
    """
    same_data({"this prepared set": prepared.digest, **{one.name: one.data_digest for one in found}})
    config = file.compare
    chosen = draw_requests(prepared, config.split, config.max_requests, config.seed)
    if not len(chosen):
        raise DataError(f"{prepared.directory}: split {config.split!r} has no requests; prepare a longer period")
    kept = [saved_predictions(one.scores, config.sampler) for one in found if one.scores is not None]
    if kept:  # whatever was scored already decides which requests are asked
        chosen = _sample(prepared, config, np.unique(np.concatenate([one.index for one in kept])))
    predictions = []
    for place, one in enumerate(found):
        progress(place, len(found), f"scoring with {one.name}")
        if one.scores is not None:
            predictions.append(replace(kept.pop(0), name=one.name))
        elif one.model is not None:
            predictions.append(predict(one.name, one.model(), prepared, chosen, config.sampler, config.split))
    return decide(predictions, {one.name: one.method for one in found}, prepared, file)


def predict(
    name: str, model: AnyRanker, prepared: PreparedSet, chosen: Sample, sampler: str, split: Literal["valid", "test"]
) -> Predictions:
    """Score the fixed candidates of some requests."""
    sets = prepared.candidates(split, sampler).take(chosen.index)
    scores = matched(score_sets(model, prepared, chosen, sets), sets.item, prepared, sampler)
    return Predictions(
        name, prepared.digest, chosen.index, chosen.requests.user, sets.offsets, sets.item, sets.label, scores
    )


def decide(
    predictions: Sequence[Predictions], methods: Mapping[str, str | None], prepared: PreparedSet, file: CompareFile
) -> Compared:
    """Return the verdicts on models that have scored the same candidates.

    Args:
        predictions: one per model.
        methods: by name, what it was trained with but for the seed; models of one method are twins.
        prepared: the set the requests come from.
        file: what decides.
    """
    same_questions(predictions)
    config, first = file.compare, predictions[0]
    sets = prepared.candidates(config.split, config.sampler).take(first.index)
    chosen = _sample(prepared, config, first.index)
    if not np.array_equal(sets.item, first.item):
        raise DataError(f"{first.name}: its candidates are not those of {prepared.directory}; evaluate it again")
    pool = Pool(chosen, sets, groups_of(sets.offsets), in_history(prepared, chosen, sets))
    segments = segments_of(prepared, chosen, pool.request, sets.item, file.segments)
    settings = EvaluateConfig(history_edges=config.history_edges)
    estimates = {one.name: _estimates(pool, one.score, settings, segments, config) for one in predictions}
    users = len(np.unique(chosen.requests.user))
    known = {
        name.removeprefix("segment/").removesuffix(f"/{SEGMENT_METRIC}")
        for name in estimates[first.name]
        if _is_of_segment(name)
    }
    absent = [segment.name for segment in segments if segment.name not in known]
    absent += [name for name in OF_TARGETS if name in config.segments and name not in (*known, *absent)]
    for name in config.segments:
        if name not in known and name not in absent:
            raise ConfigError(f"[compare] segments: no segment {name!r}; there are {', '.join(sorted(known))}")
    rule = Rule(config.level, config.power, config.least_seeds, config.seed)
    strict = replace(rule, level=1 - (1 - config.level) / max(len(config.segments), 1))
    groups = _groups([one.name for one in predictions], methods)
    primary = Question(config.metric, "", users)
    twins = [v for runs in groups.values() if len(runs) > 1 for v in _twins(primary, runs, estimates, rule)]
    return Compared(
        config=config,
        data_digest=prepared.digest,
        requests=len(chosen),
        users=users,
        methods=groups,
        values={name: _values(found) for name, found in estimates.items()},
        primary=_verdicts(primary, groups, estimates, rule),
        twins=twins,
        segments=[v for name in config.segments for v in _segment(name, groups, estimates, users, strict)],
        exploratory=[
            v for name in sorted(known - set(config.segments)) for v in _segment(name, groups, estimates, users, rule)
        ],
        not_defined=absent,
        agrees=float(np.mean([one.word == "cannot tell" for one in twins])) if twins else None,
    )


def _sample(prepared: PreparedSet, config: CompareConfig, index: NDArray[np.int64]) -> Sample:
    requests: Requests = prepared.requests(config.split)
    if len(index) and index[-1] >= len(requests):
        raise DataError(f"request {index[-1]} was scored, but split {config.split!r} has {len(requests):,}")
    taken = requests.take(index)
    return Sample(index, taken, np.asarray(prepared.histories.offsets[taken.user]))


def _estimates(
    pool: Pool, score: NDArray[np.float32], settings: EvaluateConfig, segments: list[Segment], config: CompareConfig
) -> dict[str, Estimate]:
    result = on_candidates(pool, score, settings, segments)
    wanted = {
        name: statistic
        for name, statistic in result.statistics.items()
        if name == config.metric or _is_of_segment(name)
    }
    return bootstrap(wanted, result.users, config.resamples, config.seed)


def _is_of_segment(name: str) -> bool:
    """Whether a metric is the one that segments are compared by."""
    return name.startswith("segment/") and name.endswith(f"/{SEGMENT_METRIC}")


def _groups(names: Sequence[str], methods: Mapping[str, str | None]) -> dict[str, list[str]]:
    """Return the runs of each method, by the name of its first run."""
    leader: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        method = methods.get(name) or f"only {name}"
        groups.setdefault(leader.setdefault(method, name), []).append(name)
    return groups


def _verdicts(
    ask: Question, groups: Mapping[str, list[str]], estimates: Mapping[str, Mapping[str, Estimate]], rule: Rule
) -> list[Verdict]:
    """Return one verdict per pair of methods: on the files where either has one run each, else on the methods."""
    name = f"segment/{ask.segment}/{SEGMENT_METRIC}" if ask.segment else ask.metric
    found = []
    for one, other in combinations(groups, 2):
        ours, theirs = ([estimates[run][name] for run in groups[key]] for key in (one, other))
        if len(ours) == len(theirs) == 1:
            found.append(verdicts.of_files(ask, (one, ours[0]), (other, theirs[0]), rule))
        else:
            found.append(verdicts.of_methods(ask, (one, ours), (other, theirs), rule))
    return found


def _twins(
    ask: Question, runs: Sequence[str], estimates: Mapping[str, Mapping[str, Estimate]], rule: Rule
) -> list[Verdict]:
    return verdicts.all_twins(ask, {run: estimates[run][ask.metric] for run in runs}, rule)


def _segment(
    name: str,
    groups: Mapping[str, list[str]],
    estimates: Mapping[str, Mapping[str, Estimate]],
    users: int,
    rule: Rule,
) -> list[Verdict]:
    full = f"segment/{name}/{SEGMENT_METRIC}"
    ask = Question(SEGMENT_METRIC, name, users)
    if any(full not in found for found in estimates.values()):
        return [verdicts.not_defined("files", ask, *pair) for pair in combinations(groups, 2)]
    return _verdicts(ask, groups, estimates, rule)


def _values(found: Mapping[str, Estimate]) -> dict[str, float | None]:
    return {name: None if np.isnan(one.value) else one.value for name, one in found.items()}
