"""The funnel of the published system: where what users took is lost between the catalogue and the answer.

The very recommender of the service answers requests of the test period, with its filters and rules, and every stage is
asked which of the positives it still holds:

    <source>      recall of what each candidate source proposes, up to its quota
    union         of all of them together: no later stage can find more
    ranked        the first 10 and 50 after the ranker: recall, NDCG
    answer        the same after the rules, as users get it

Requests with a query go another way, through a search: `pipelines.funnel_search`.

Beside it what the lists are like: coverage (share of the trained items that anybody is shown among the first k),
novelty (mean of -log2 of an item's share of training events, in bits), diversity (share of pairs in a list of different
categories), popularity bias (mean training events of what is shown over that of what was taken).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.evaluation import defined
from pipelines.prepared import PreparedSet, Split
from pipelines.scoring import Sample, draw_requests
from pipelines.tables import Cell, Table
from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from recsys.bootstrap import Ratio, Statistic, bootstrap
from recsys.columns import USER_ID
from recsys.errors import DataError
from recsys.files import write_json
from recsys.history import Events
from recsys.messages import RecommendRequest
from recsys.metrics import Floats, Ranking, mean, ndcg, rank, recall
from recsys.progress import Progress, silent

K = 10
DEEP = 50


@dataclass(frozen=True)
class Stage:
    """What a stage still holds: mean candidates per request, recall of the positives with its interval, NDCG@10.

    `recall` is over all the stage holds for sources and union, and of the first 50 for lists in an order; `ndcg_at_10`
    and `recall_at_10` are None where there is no order to speak of.
    """

    name: str
    candidates: float
    recall: float | None
    ci_low: float | None
    ci_high: float | None
    recall_at_10: float | None = None
    ndcg_at_10: float | None = None


@dataclass(frozen=True)
class Lists:
    """What the answers are like, over the first k."""

    k: int
    coverage: float
    novelty: float | None
    diversity: float | None
    popularity_bias: float | None


@dataclass(frozen=True)
class Funnel:
    """The funnel of one bundle on some requests of a split.

    `searched` are the stages of `searches` requests with a query (`pipelines.funnel_search`), if the bundle searches.
    """

    bundle: str
    split: str
    requests: int
    users: int
    stages: list[Stage]
    lists: Lists
    searches: int = 0
    searched: list[Stage] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_json(path, asdict(self))


class PreparedHistories:
    """Histories of a prepared set by outside user id; a `recsys.stores.HistoryReader`."""

    def __init__(self, prepared: PreparedSet) -> None:
        self._prepared = prepared
        self.ids = prepared.users[USER_ID].cast(pl.String).to_list()
        self._row = {user: row for row, user in enumerate(self.ids)}

    def read(self, user_id: str) -> Events | None:
        """Return the user's whole history, None for one the set does not know."""
        row = self._row.get(user_id)
        return None if row is None else self._prepared.histories.of(row)


def measure_funnel(
    bundle: Bundle,
    prepared: PreparedSet,
    split: Split = "test",
    requests: int = 200,
    resamples: int = 1000,
    seed: int = 2023,
    progress: Progress = silent,
) -> Funnel:
    """Follow the positives of some requests through the published system.

    Raises:
        DataError: the bundle is of other data (both digests named), or the split has no requests.

    Cost: one request of the service each.
    """
    digest = bundle.manifest.provenance.data_digest
    if digest != prepared.digest:
        raise DataError(
            f"{bundle.directory}: bundle of data {digest[:12]}, {prepared.directory} is {prepared.digest[:12]}; "
            "publish a run of this set"
        )
    sample = draw_requests(prepared, split, requests, seed)
    if not len(sample):
        raise DataError(f"{prepared.directory}: split {split!r} has no requests; prepare a longer period")
    found = _follow(bundle, prepared, sample, progress)
    users, user = np.unique(sample.requests.user, return_inverse=True)
    ranked, answer = (ranking_of(sample, rows) for rows in (found.ranked, found.answers))
    values = {name: _held(sample, rows) for name, rows in found.proposed.items()}
    values |= {"ranked": recall(ranked, DEEP), "answer": recall(answer, DEEP)}
    statistics: dict[str, Statistic] = {name: Ratio.of_groups(held, user, len(users)) for name, held in values.items()}
    estimates = bootstrap(statistics, len(users), resamples, seed)
    lists = {**found.proposed, "ranked": found.ranked, "answer": found.answers}
    stages = []
    for name, estimate in estimates.items():
        low, high = estimate.interval()
        order = {"ranked": ranked, "answer": answer}.get(name)
        stages.append(
            Stage(
                name,
                float(np.mean([len(rows) for rows in lists[name]])),
                defined(estimate.value),
                defined(low),
                defined(high),
                None if order is None else defined(mean(recall(order, K))),
                None if order is None else defined(mean(ndcg(order, K))),
            )
        )
    first = [rows[:K] for rows in found.answers]
    return Funnel(bundle.version, split, len(sample), len(users), stages, lists_are(prepared, first, sample))


def lists_are(prepared: PreparedSet, lists: Sequence[NDArray[np.int32]], sample: Sample) -> Lists:
    """Say what lists of model rows are like."""
    items = prepared.items
    count = items.count.cpu().numpy().astype(np.float64)
    trained = items.trained.cpu().numpy()
    shown = np.concatenate([*lists, np.empty(0, np.int32)])
    taken = sample.requests.positive[sample.requests.positive >= FIRST_ITEM]
    known = shown[count[shown] > 0]
    novelty = float(np.mean(-np.log2(count[known] / count[trained].sum()))) if len(known) else None
    usual = float(count[taken].mean()) if len(taken) else 0.0
    diversity = None
    if items.columns and any(len(rows) > 1 for rows in lists):
        category = items.column(items.columns[0]).cpu().numpy()
        diversity = float(np.mean([_different(category[rows]) for rows in lists if len(rows) > 1]))
    return Lists(
        max((len(rows) for rows in lists), default=0),
        len(np.unique(known)) / max(int(trained.sum()), 1),
        novelty,
        diversity,
        float(count[shown].mean()) / usual if len(shown) and usual else None,
    )


def tables(funnel: Funnel) -> list[Table]:
    """Return the funnel and what the lists are like, as tables of the report."""
    rows = [_row(stage) for stage in funnel.stages]
    note = (
        f"Bundle `{funnel.bundle}` on {funnel.requests:,} `{funnel.split}` requests of {funnel.users:,} users, all "
        "items of the catalogue being candidates. Recall of sources and their union is over all they propose, that of "
        f"`ranked` and `answer` (after filters and rules) over the first {DEEP}, the k asked for."
    )
    told = funnel.lists
    bias = "–" if told.popularity_bias is None else f"{told.popularity_bias:.2f}"
    facts = (
        ("Coverage of trained items", _number(told.coverage)),
        ("Novelty, bits", "–" if told.novelty is None else f"{told.novelty:.2f}"),
        ("Diversity of categories", _number(told.diversity)),
        ("Popularity over that of what was taken", bias),
    )
    header = ("Stage", "Candidates", "Recall", f"Recall@{K}", f"NDCG@{K}")
    searched = (
        f"{funnel.searches:,} of these requests with a query: two neighbouring words of the name of an item that was "
        f"taken; to be found is what was taken and holds them. Recall over the first {DEEP}. `search` is the first "
        "stage's order, `answer` blends it with the ranker's for this user."
    )
    more = [Table("With a query", header, tuple(_row(stage) for stage in funnel.searched), searched)]
    return [
        Table("Where positives are lost", header, tuple(rows), note),
        *(more if funnel.searched else []),
        Table(
            f"The first {told.k} of the answers", ("", ""), tuple((Cell(name), Cell(value)) for name, value in facts)
        ),
    ]


@dataclass(frozen=True)
class _Followed:
    """Model rows per request: what each source and their union proposed, in the ranker's order, and as answered."""

    proposed: dict[str, list[NDArray[np.int32]]]
    ranked: list[NDArray[np.int32]]
    answers: list[NDArray[np.int32]]


def _follow(bundle: Bundle, prepared: PreparedSet, sample: Sample, progress: Progress) -> _Followed:
    reader = PreparedHistories(prepared)
    recommender = Recommender(bundle, reader)
    proposed: dict[str, list[NDArray[np.int32]]] = {}
    ranked, answers = [], []
    requests = sample.requests
    for place, (user, at) in enumerate(zip(requests.user.tolist(), requests.at.tolist(), strict=True)):
        found = recommender.trace(RecommendRequest(user_id=reader.ids[user], k=DEEP, at=at), at)
        rows = np.asarray(found.pool.rows)
        for number, name in enumerate(found.sources):
            proposed.setdefault(name, [np.empty(0, np.int32)] * place).append(rows[found.pool.rank[number] > 0])
        proposed = {
            name: given if len(given) > place else [*given, np.empty(0, np.int32)] for name, given in proposed.items()
        }
        ranked.append(rows)
        answers.append(rows[found.chosen.places][:DEEP])
        progress(place + 1, len(sample), "funnel")
    proposed = {name: given for name, given in proposed.items() if any(map(len, given))}
    return _Followed({**proposed, "union": ranked}, ranked, answers)


def _held(sample: Sample, lists: Sequence[NDArray[np.int32]]) -> Floats:
    """Return the share of each request's positives among its rows, float64 [R]; NaN where it has none."""
    offsets, positive = sample.requests.offsets, sample.requests.positive
    return np.array(
        [
            np.isin(positive[a:b], rows).mean() if b > a else np.nan
            for a, b, rows in zip(offsets[:-1], offsets[1:], lists, strict=True)
        ]
    )


def ranking_of(sample: Sample, lists: Sequence[NDArray[np.int32]]) -> Ranking:
    """Rank lists in order; positives that are not in a list stand behind it, so that they count as not found."""
    offsets, positive = sample.requests.offsets, sample.requests.positive
    score, label, group = [], [], []
    for request, rows in enumerate(lists):
        own = positive[offsets[request] : offsets[request + 1]]
        missed = own[~np.isin(own, rows)]
        pad = max(DEEP - len(rows), 0)  # empty places of a short list
        score.append(-np.arange(len(rows) + pad + len(missed), dtype=np.float32))
        label.append(np.r_[np.isin(rows, own), np.zeros(pad, np.bool_), np.ones(len(missed), np.bool_)])
        group.append(np.full(len(score[-1]), request))
    return rank(np.concatenate(score), np.concatenate(label), np.concatenate(group), len(lists))


def _different(category: NDArray[np.int32]) -> float:
    pairs = len(category) * (len(category) - 1) / 2
    same = sum(n * (n - 1) / 2 for n in np.unique(category, return_counts=True)[1].tolist())
    return float(1 - same / pairs)


def _row(stage: Stage) -> tuple[Cell, ...]:
    bounds = "" if stage.ci_low is None or stage.ci_high is None else f"{stage.ci_low:.4f}–{stage.ci_high:.4f}"
    cells = [Cell(stage.name), Cell(f"{stage.candidates:,.1f}"), Cell(_number(stage.recall), bounds)]
    return (*cells, Cell(_number(stage.recall_at_10)), Cell(_number(stage.ndcg_at_10)))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
