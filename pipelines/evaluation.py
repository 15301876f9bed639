"""What an evaluation says, as frozen records and as `metrics.json`.

    {
      "format": 1, "split": "test", "data_digest": "...", "run_ids": {"dare": "..."}, "config": {...EvaluateConfig...},
      "n_requests": 2000, "n_users": 1200,                       requests scored, the same for every model
      "candidates": {"uniform": {...CandidateFacts...}, "all_items": {...}},
      "metrics": {"dare": {"uniform": {"test/auc": 0.9, "test/auc.ci_low": 0.89, "test/auc.ci_high": 0.91, ...,
                                       "test/segment/target_outside_history/auc": ..., "test/logloss": null},
                           "all_items": {"test/ndcg_at_10": ...}}},
      "comparisons": [{...Comparison...}],                       paired over the same resamples of the users
      "cost": {"dare": {...Cost...}},
      "cold_start": {...ColdStart...},                           null if no positive is without training events
      "segments": [{...SegmentFacts...}],                        parts told apart on the first sampler's candidates
      "agreement": [{...Agreement...}],                          sampled against full ranking, by sampler
      "attention": {...AttentionFound...},                       null if no model looks at single events
      "reliability": {"dare": {...Reliability...}}               probabilities against what was taken; {} if not defined
    }

null stands for "not defined": log loss and calibration on sampled candidates, an interval of fewer than two users, the
AUC of one class. Beside it, `predictions/` holds what was scored (`requests.safetensors`) and every model's scores in
the same order (`<model>.safetensors`), so that two evaluations can be compared in pairs later.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter, ValidationError

from pipelines.attention_record import AttentionFound
from pipelines.calibration import Reliability
from pipelines.prepared import IMPRESSIONS
from pipelines.segments import SegmentsConfig
from ranking.content_vectors import ContentQuality
from recsys.config import first_problem
from recsys.errors import ConfigError, DataError
from recsys.files import read_json, whole_directory, write_json

FORMAT = 1
ALL_ITEMS = "all_items"
"""Stands where a sampler's name stands, for the full ranking of all known items."""
INSIDE = "target_in_history"
OUTSIDE = "target_outside_history"
NOT_DEFINED = ("logloss", "ece")
"""Metrics of click probabilities: sampled candidates have none that scores could be calibrated to."""

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate and how much of it.

    Attributes:
        split: requests to score; `impressions` are answers that were shown in the test period, with what was shown as
            their only candidates (`pipelines/shown.py`): there log loss and calibration error are defined.
        protocol: `candidates`, all that follows; or `leave_one_out`: all items for every request, by the rules of
            `pipelines/leave_one_out.py`, which leaves only split, resamples, level and seed to choose.
        samplers: candidate sets to score; the first is the one the report's summary speaks of.
        max_requests: most requests scored, drawn by seed, the same for every model.
        full_ranking_requests: requests (drawn from those) for which all items are ranked. At least one: metrics on
            sampled candidates are never given without the full ranking beside them.
        cold_requests: most requests on which finding items without training events is measured; 0 leaves it out.
        attention_requests: most requests on which attention is measured; 0 leaves it out.
        funnel_requests: most requests put to the published bundle, if there is one of this data; 0 leaves it out.
        batch_requests: most requests of one batch.
        resamples: of the users, for the intervals; 0 gives none.
        level: of the intervals.
        history_edges: lengths at which the history segments start anew.
        seed: of the requests drawn and of the resamples.
        champion: the model that others are held against by segment; absent, the one of the highest GAUC.
        segments: which further parts of the requests are told apart, on the first sampler's candidates.
    """

    split: Literal["valid", "test", "impressions"] = "test"
    protocol: Literal["candidates", "leave_one_out"] = "candidates"
    samplers: tuple[str, ...] = ("uniform", "popularity")
    max_requests: int = 20_000
    full_ranking_requests: int = 200
    cold_requests: int = 200
    attention_requests: int = 200
    funnel_requests: int = 200
    batch_requests: int = 256
    resamples: int = 1000
    level: float = 0.95
    history_edges: tuple[int, ...] = (50, 200, 500, 1000)
    seed: int = 2023
    champion: str | None = None
    segments: SegmentsConfig = field(default_factory=SegmentsConfig)

    def __post_init__(self) -> None:
        least = {"max_requests": 1, "full_ranking_requests": 1, "batch_requests": 1}
        for name in (*least, "cold_requests", "attention_requests", "funnel_requests", "resamples"):
            if getattr(self, name) < least.get(name, 0):
                raise ConfigError(f"evaluate: {name} = {getattr(self, name)}; expected at least {least.get(name, 0)}")
        if not self.samplers:
            raise ConfigError("evaluate: samplers is empty; name at least one, e.g. uniform")
        shown = IMPRESSIONS in (self.split, *self.samplers)
        if shown and (self.split, self.samplers, self.protocol) != (IMPRESSIONS, (IMPRESSIONS,), "candidates"):
            raise ConfigError(
                f"evaluate: split = {self.split!r} with samplers = {list(self.samplers)}; what was shown is the only "
                'candidates of its split: set both, split = "impressions" and samplers = ["impressions"]'
            )
        if not 0 < self.level < 1:
            raise ConfigError(f"evaluate: level = {self.level}; expected a share between 0 and 1, e.g. 0.95")
        if list(self.history_edges) != sorted({edge for edge in self.history_edges if edge > 0}):
            raise ConfigError(
                f"evaluate: history_edges = {list(self.history_edges)}; expected ascending lengths above 0"
            )


@dataclass(frozen=True)
class CandidateFacts:
    """What an AUC was measured on: printed beside every one.

    Shares are of candidates found in the request's whole history (all events before its moment), in 0..1.
    """

    requests: int
    users: int
    candidates: int
    positives_per_request: float
    negatives_per_request: float
    positives_in_history: float
    negatives_in_history: float


@dataclass(frozen=True)
class Cost:
    """What scoring the candidates of all samplers took, in batches: assembling, encoding and scoring.

    `p50_ms` is the median over single requests scored one by one, as a service meets them, with the first sampler's
    candidates; `bytes` those of the model's weights.
    """

    seconds: float
    requests: int
    candidates: int
    ms_per_request: float
    device: str
    p50_ms: float | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A paired difference, model minus other, over the same resamples of the users.

    `share_better` is the share of resamples in which the model is above the other, an equal one counted half.
    """

    sampler: str
    metric: str
    model: str
    other: str
    difference: float
    ci_low: float | None
    ci_high: float | None
    share_better: float | None

    @property
    def certain(self) -> bool:
        """Whether the interval lies on one side of zero; where it does not, no difference was found."""
        return self.ci_low is not None and self.ci_high is not None and (self.ci_low > 0 or self.ci_high < 0)


@dataclass(frozen=True)
class SegmentFacts:
    """A part of the requests that quality is told of: its name, what it is a part by, and how much of it there is.

    `positives` are those to be found in it; with none, nothing is defined.
    """

    name: str
    kind: str
    words: str
    requests: int
    users: int
    positives: int


@dataclass(frozen=True)
class Agreement:
    """Whether sampled candidates put the models in the order of the full ranking, on the very same requests.

    `tau` is Kendall's rank correlation (tau-b) of the models' values of `metric`; None for fewer than two models or
    where one side tells none of them apart.
    """

    sampler: str
    metric: str
    requests: int
    models: int
    tau: float | None


@dataclass(frozen=True)
class ColdScore:
    """How well a scorer finds items without training events.

    `auc` and `recall_at_50` are means over requests, among all such items of the catalogue, with their intervals;
    `recall_at_100_of_all` is a retriever's recall among all items, by its vectors.
    """

    auc: float
    auc_low: float | None
    auc_high: float | None
    recall_at_50: float
    recall_low: float | None
    recall_high: float | None
    recall_at_100_of_all: float | None = None


@dataclass(frozen=True)
class ColdStart:
    """Finding items first seen after training (`pipelines.cold_start`).

    Attributes:
        items: items of the catalogue without training events: the candidates.
        requests: requests with a positive among them.
        users: whose requests these are.
        targets: such positives.
        scores: by scorer: references, models, retrievers with content.
        content: by retriever, how well content tells the vectors of trained items held out.
    """

    items: int
    requests: int
    users: int
    targets: int
    scores: dict[str, ColdScore]
    content: dict[str, ContentQuality]


@dataclass(frozen=True)
class TrainingSummary:
    """What training a model took, for the cost table; the training loop fills it in.

    Attributes:
        seconds: of training steps, validation left out.
        steps: optimiser steps taken; 0 for models that do not train.
        best_step: step whose weights were kept.
        samples_per_second: training rows (requests or user sequences) per second of training steps.
        seconds_per_epoch: what one pass over the training rows takes at that speed.
        parameters: trainable numbers, embeddings included.
        peak_memory_bytes: largest resident memory of the training process; 0 if not known.
        device: e.g. `cpu`.
        config: the run's configuration, nested plain values.
        curve: one entry per validation: `step` and the measured values by name.
    """

    model: str
    seconds: float
    steps: int
    best_step: int
    samples_per_second: float
    seconds_per_epoch: float
    parameters: int
    peak_memory_bytes: int = 0
    device: str = "cpu"
    config: dict[str, Any] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)

    def table(self) -> dict[str, Any]:
        """Return the summary as plain values, for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def of(table: Mapping[str, Any]) -> "TrainingSummary":
        """Read what `table` gave; raises `DataError` naming the field that does not fit."""
        try:
            return TypeAdapter(TrainingSummary).validate_python(dict(table))
        except ValidationError as error:
            raise DataError(f"training summary: {first_problem(error)}") from None

    def best(self, metric: str) -> float:
        """Return a validation metric at the step whose weights were kept; NaN where it was not measured."""
        kept = (entry for entry in self.curve if entry["step"] == self.best_step)
        return next(kept, {}).get(f"valid/{metric}", math.nan)


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation found. `predictions` are kept beside it on disk and not read back with it.

    Attributes:
        metrics: model -> sampler (or `all_items`) -> metric name -> value.
        run_ids: model -> the training run that was judged.
        predictions: file stem -> tensor name -> numpy array; `requests` and one per model.
    """

    split: str
    data_digest: str
    config: EvaluateConfig
    n_requests: int
    n_users: int
    candidates: dict[str, CandidateFacts]
    metrics: dict[str, dict[str, Metrics]]
    comparisons: list[Comparison]
    cost: dict[str, Cost]
    cold_start: ColdStart | None = None
    segments: list[SegmentFacts] = field(default_factory=list)
    agreement: list[Agreement] = field(default_factory=list)
    attention: AttentionFound | None = None
    reliability: dict[str, Reliability] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def models(self) -> list[str]:
        """Names of the models, in the order they were evaluated."""
        return list(self.metrics)

    def metric(self, model: str, sampler: str, name: str) -> float | None:
        """Return one value, e.g. `gauc` or `segment/history_50_199/auc`; None where it is not defined or absent."""
        return self.metrics.get(model, {}).get(sampler, {}).get(f"{self.split}/{name}")

    def interval(self, model: str, sampler: str, name: str) -> tuple[float, float] | None:
        """Return the interval of one value; None where there is none."""
        low, high = (self.metric(model, sampler, f"{name}.{end}") for end in ("ci_low", "ci_high"))
        return None if low is None or high is None else (low, high)

    def flat(self, model: str) -> dict[str, float]:
        """Return a model's defined metrics as `<split>/<sampler>/<name>`, ready to be logged."""
        return {
            f"{self.split}/{sampler}/{name.removeprefix(self.split + '/')}": value
            for sampler, values in self.metrics[model].items()
            for name, value in values.items()
            if value is not None
        }

    def compare(self, sampler: str, name: str, model: str, other: str) -> Comparison | None:
        """Return the paired difference of two models in one metric, whichever way round it was stored."""
        for found in self.comparisons:
            if (found.sampler, found.metric) != (sampler, f"{self.split}/{name}"):
                continue
            if (found.model, found.other) == (model, other):
                return found
            if (found.model, found.other) == (other, model):
                return _reversed(found)
        return None

    def save(self, directory: Path) -> None:
        """Write `metrics.json` and `predictions/*.safetensors`, the directory whole or not at all."""
        from safetensors.numpy import save_file

        record = {key.name: getattr(self, key.name) for key in dataclasses.fields(self) if key.name != "predictions"}
        plain = TypeAdapter(dict[str, Any]).dump_python({"format": FORMAT, **record}, mode="json")
        with whole_directory(directory) as temporary:
            write_json(temporary / "metrics.json", plain | {"models": self.models})
            (temporary / "predictions").mkdir()
            for stem, tensors in self.predictions.items():
                arrays = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
                save_file(arrays, temporary / "predictions" / f"{stem}.safetensors")

    @staticmethod
    def load(directory: Path) -> "Evaluation":
        """Read `metrics.json` of what `save` wrote; raises `DataError` for another format or a damaged file."""
        path = directory / "metrics.json"
        record = read_json(path)
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise DataError(f"{path}: not an evaluation of format {FORMAT}; run `recsys evaluate` again")
        models = record.pop("models", None)
        try:
            evaluation = TypeAdapter(Evaluation).validate_python(record)
        except ValidationError as error:
            raise DataError(f"{path}: {first_problem(error)}") from None
        ordered = {name: evaluation.metrics[name] for name in models or sorted(evaluation.metrics)}
        return dataclasses.replace(evaluation, metrics=ordered)


def _reversed(found: Comparison) -> Comparison:
    """Return the same comparison read the other way round."""
    return dataclasses.replace(
        found,
        model=found.other,
        other=found.model,
        difference=-found.difference,
        ci_low=None if found.ci_high is None else -found.ci_high,
        ci_high=None if found.ci_low is None else -found.ci_low,
        share_better=None if found.share_better is None else 1 - found.share_better,
    )


def defined(value: float) -> float | None:
    """Return the value, or None in place of NaN: how "not defined" is written in JSON."""
    return None if math.isnan(value) else float(value)


def length_segments(edges: Sequence[int]) -> list[tuple[str, int, int | None]]:
    """Return the history segments: name, least length, and the length it ends before (None: no end)."""
    return [
        (f"history_{low}_up" if high is None else f"history_{low}_{high - 1}", low, high)
        for low, high in zip([0, *edges], [*edges, None], strict=True)
    ]
