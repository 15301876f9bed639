"""Items first seen after training: what vectors their content gives them, and how well they are found.

Measured on the requests of a split that have a positive without training events, among all such items of the catalogue
(some of them appear only later in the split: the same for everybody). Beside the models stand

    random               the expectation of a random order, exact
    popular <column>     training events of the item's category, the same for every user
    own <column>         events of the item's category in the user's history, then its popularity
    content match        likeness to the user's items beyond what is usual (`ranking.content`): the source `new_items`

with the categorical column that does best on these very requests, which flatters `popular` and `own`.

    R requests    n items without training events    C codes of a categorical column
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.evaluation import ColdScore, ColdStart, EvaluateConfig
from pipelines.prepared import CandidateSets, PreparedSet
from pipelines.scoring import Sample, choose, draw_requests, is_retriever, rank_all_items, score_sets
from ranking.batch import FIRST_ITEM, rows_of
from ranking.content import FIRST_CODE, ContentMatch, Features, content_features, match_content
from ranking.content_vectors import ContentQuality, ContentVectors, VectorsConfig, WithContent, learn_vectors
from ranking.ranker import AnyRanker, Retriever
from recsys.bootstrap import Ratio, bootstrap
from recsys.columns import ITEM_ID, TEXT
from recsys.metrics import Ranking, auc, groups_of, rank, recall
from recsys.progress import Progress, silent

AMONG_COLD = 50
AMONG_ALL = 100
MOST_SCORES = 1 << 25
"""Most scores of one model held at once; fewer requests are measured where there are more new items."""

Floats = NDArray[np.float32]
"""Called as (what is being done, done, in all)."""


def item_names(prepared: PreparedSet) -> list[str]:
    """Return what every model row is shown by, the first line of its text; as `item_texts` else."""
    return [text.lstrip("\n").partition("\n")[0] for text in item_texts(prepared)]


def item_texts(prepared: PreparedSet) -> list[str]:
    """Return the text of every model row, its id where there is none, "" for rows 0 and 1."""
    catalogue = prepared.catalogue
    ids = catalogue[ITEM_ID].cast(pl.String)
    texts = catalogue[TEXT].cast(pl.String).fill_null(ids) if TEXT in catalogue.columns else ids
    names = [""] * len(prepared.items)
    for row, text in zip(prepared.key_to_row.tolist(), texts.to_list(), strict=True):
        if row >= FIRST_ITEM:
            names[row] = text
    return names


def features_of(prepared: PreparedSet) -> Features:
    """Return what is known of every model row."""
    return content_features(prepared.items, item_texts(prepared))


def vectors_of(
    retriever: AnyRanker, features: Features, config: VectorsConfig | None = None
) -> tuple[ContentVectors | None, ContentQuality | None]:
    """Learn from the retriever's item vectors what vectors the items without training events should have.

    See `ranking.content_vectors.learn_vectors`, also for what is None when.
    """
    assert is_retriever(retriever)
    vectors: Retriever = retriever  # type: ignore[assignment]
    trained = retriever.items.trained.cpu()
    if bool(trained[FIRST_ITEM:].all()):
        return None, None
    return learn_vectors(features, vectors.item_vectors().cpu(), trained, config or VectorsConfig())


def measure_cold_start(
    models: Mapping[str, AnyRanker], prepared: PreparedSet, config: EvaluateConfig, progress: Progress = silent
) -> ColdStart | None:
    """Say how well items without training events are found, or None if no request of the split has such a positive.

    Args:
        models: by name; a retriever is measured as it is, and once more with vectors from content if they are of use.
        prepared: the set.
        config: split, number of requests (`cold_requests`), resamples, seed.
        progress: called once per model.

    Cost: every model scores R x n candidates.
    """
    items = prepared.items
    cold = np.flatnonzero(~items.trained.cpu().numpy()).astype(np.int32)
    cold = cold[cold >= FIRST_ITEM]
    sample = _cold_requests(prepared, config, cold)
    if not len(sample):
        return None
    task = _Task(prepared, config, cold, sample)
    scores = {"random": task.judge(np.zeros(task.size, np.float32))}
    for kind, found in _by_category(task).items():
        column = max(found, key=lambda name: found[name].auc)
        scores[f"{kind} {column}"] = found[column]
    features, quality = features_of(prepared), {}
    match = match_content(features, items.count.cpu())
    if match is not None:
        scores["content match"] = task.judge(task.match(match))
    for place, (name, model) in enumerate(models.items()):
        progress(place, len(models), f"{name}: items without training events")
        scores[name] = task.judge(task.score(model), model)
        if is_retriever(model):
            vectors, told = vectors_of(model, features)
            if told is not None:
                quality[name] = told
            if vectors is not None:
                filled = WithContent(model, vectors)
                scores[f"{name} with content"] = task.judge(task.score(filled), filled)
    return ColdStart(
        items=len(cold),
        requests=len(sample),
        users=len(np.unique(sample.requests.user)),
        targets=len(sample.requests.positive),
        scores=scores,
        content=quality,
    )


class _Task:
    """The same requests and candidates for every scorer."""

    def __init__(self, prepared: PreparedSet, config: EvaluateConfig, cold: NDArray[np.int32], sample: Sample) -> None:
        self.prepared, self.config, self.cold, self.sample = prepared, config, cold, sample
        requests = sample.requests
        label = np.zeros((len(sample), len(cold)), np.uint8)
        label[groups_of(requests.offsets), np.searchsorted(cold, requests.positive)] = 1
        offsets = np.arange(len(sample) + 1, dtype=np.int64) * len(cold)
        self.sets = CandidateSets(offsets, np.tile(cold, len(sample)), label.reshape(-1))
        self.size = len(self.sets.item)

    def score(self, model: AnyRanker) -> Floats:
        """Return the model's scores, float32 [R * n]."""
        return score_sets(model, self.prepared, self.sample, self.sets)

    def match(self, content: ContentMatch) -> Floats:
        """Return the lift of every item, 0 for those of which nothing is known, float32 [R * n]."""
        lift = np.zeros((len(self.sample), len(self.cold)), np.float32)
        where = np.searchsorted(self.cold, content.row)
        for place, rows in enumerate(self.histories()):
            lift[place, where] = content.lift(rows)
        return lift.reshape(-1)

    def histories(self) -> Iterator[NDArray[np.int32]]:
        """Yield the item rows of each request's whole history."""
        item = self.prepared.histories.events.item
        for start, end in zip(self.sample.start, self.sample.requests.end, strict=True):
            yield rows_of(np.asarray(item[start:end]), self.prepared.key_to_row)

    def judge(self, score: Floats, model: AnyRanker | None = None) -> ColdScore:
        """Measure scores [R * n]; a retriever's vectors also among all items."""
        found = rank(score, self.sets.label, groups_of(self.sets.offsets), len(self.sample))
        area = self._estimate(auc(found))
        share = self._estimate(recall(found, min(AMONG_COLD, len(self.cold))))
        everything = None
        if model is not None and is_retriever(model):
            ranking: Ranking = rank_all_items(model, self.prepared, self.sample, AMONG_ALL, by_vectors=True)
            everything = float(np.mean(recall(ranking, AMONG_ALL)))
        return ColdScore(*area, *share, everything)

    def _estimate(self, values: NDArray[np.float64]) -> tuple[float, float | None, float | None]:
        users, user = np.unique(self.sample.requests.user, return_inverse=True)
        ratio = {"value": Ratio.of_groups(values, user, len(users))}
        estimate = bootstrap(ratio, len(users), self.config.resamples, self.config.seed)["value"]
        _, low, high = estimate.told(self.config.level)
        return estimate.value, low, high


def _cold_requests(prepared: PreparedSet, config: EvaluateConfig, cold: NDArray[np.int32]) -> Sample:
    """Return the requests with a positive among the cold items, with those positives alone."""
    whole = draw_requests(prepared, config.split, np.iinfo(np.int64).max, config.seed)
    requests = whole.requests
    ours = np.isin(requests.positive, cold)
    number = np.bincount(groups_of(requests.offsets)[ours], minlength=len(requests))
    offsets = np.concatenate([[0], np.cumsum(number)]).astype(np.int64)
    some = np.flatnonzero(number)
    only = replace(whole, requests=replace(requests, offsets=offsets, positive=requests.positive[ours]))
    most = min(config.cold_requests, max(MOST_SCORES // max(len(cold), 1), 1))
    return only.take(some[choose(len(some), most, config.seed, "evaluate/cold start")])


def _by_category(task: _Task) -> dict[str, dict[str, ColdScore]]:
    """Judge popularity of the category and the user's own events in it, for every categorical column."""
    items = task.prepared.items
    found: dict[str, dict[str, ColdScore]] = {"popular": {}, "own": {}}
    for column in items.columns:
        code = items.column(column).cpu().numpy().astype(np.int64)  # [V]
        count = np.bincount(code, items.count.cpu().numpy(), items.codes(column))  # [C]
        count[:FIRST_CODE] = 0
        popular = count / (count.sum() + 1)  # below 1: it orders what the user's own events leave equal
        mine = np.stack([_own(code, rows, items.codes(column))[code[task.cold]] for rows in task.histories()])  # [R, n]
        place = popular[code[task.cold]]
        wide = np.tile(place, len(task.sample)).astype(np.float32)
        found["popular"][column] = task.judge(wide)
        found["own"][column] = task.judge((mine + place).astype(np.float32).reshape(-1))
    return {kind: columns for kind, columns in found.items() if columns}


def _own(code: NDArray[np.int64], rows: NDArray[np.int32], codes: int) -> NDArray[np.int64]:
    """Return how often each known code occurs among these rows, int64 [C]."""
    own = np.bincount(code[rows], minlength=codes)
    own[:FIRST_CODE] = 0
    return own
