"""Measures of a ranking of passages, through `ir-measures`: nDCG@10 with linear gain, hit@1, MRR@10, Recall@100."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.text_corpus import ITSELF, Queries
from ranking.fusion import NONE, Ranking
from recsys.bootstrap import Estimate, Ratio, bootstrap
from recsys.metrics import Floats

MEASURES = {"ndcg_at_10": "nDCG@10", "hit_at_1": "Success@1", "mrr_at_10": "RR@10", "recall_at_100": "R@100"}
"""our name -> the library's"""
RESAMPLES = 10_000


def measure(ranking: Ranking, queries: Queries, zero_docs: str = "keep", binary: bool = False) -> dict[str, Floats]:
    """Return every measure per query, float64 [Q] in the order of the queries.

    A document that is the query itself is taken out of its ranking first, as BEIR does; BEIR goes by the id alone,
    which takes a stranger out where queries and documents are both numbered from 1.

    Args:
        ranking: one row per query.
        queries: with their judgements.
        zero_docs: "remove" takes passages judged 0 out of the ranking first (Cranfield: the queries' own papers).
        binary: count every grade above 0 as 1.
    """
    import ir_measures

    judged, run = {}, {}
    for query in range(len(queries)):
        grades = queries.grades[query]
        told = {row: min(grade, 1) if binary else grade for row, grade in grades.items() if grade != ITSELF}
        judged[str(query)] = {str(row): grade for row, grade in told.items()}
        rows = [int(row) for row in ranking.rows[query] if row != NONE and grades.get(int(row)) != ITSELF]
        if zero_docs == "remove":
            rows = [row for row in rows if grades.get(row) != 0]
        run[str(query)] = {str(row): float(-place) for place, row in enumerate(rows)}  # ties stay in our order
    wanted = {name: ir_measures.parse_measure(code) for name, code in MEASURES.items()}
    values = {name: np.zeros(len(queries)) for name in MEASURES}
    named = {str(code): name for name, code in wanted.items()}
    for found in ir_measures.iter_calc(list(wanted.values()), judged, run):
        values[named[str(found.measure)]][int(found.query_id)] = found.value
    return values


@dataclass(frozen=True)
class Comparison:
    """One system against another on the same queries, in one measure."""

    difference: Estimate
    won: int  # queries
    lost: int
    tied: int

    def table(self) -> dict[str, float | None]:
        """Return JSON values; None for the ends of an interval that a few queries do not give."""
        value, low, high = self.difference.told()
        counts = {"won": self.won, "lost": self.lost, "tied": self.tied}
        return {"difference": value, "ci_low": low, "ci_high": high, **counts}


def compare(ours: Floats, theirs: Floats, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compare per-query values [Q]: the paired bootstrap over queries, and how many were won and lost."""
    gain = ours - theirs
    return Comparison(
        mean_of({"gain": gain}, resamples, seed)["gain"],
        won=int((gain > 0).sum()),
        lost=int((gain < 0).sum()),
        tied=int((gain == 0).sum()),
    )


def mean_of(values: Mapping[str, Floats], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Estimate]:
    """Return the mean over queries of each measure with its resamples, all on the same draws."""
    queries = len(next(iter(values.values())))
    each = np.arange(queries)
    statistics = {name: Ratio.of_groups(value, each, queries) for name, value in values.items()}
    return bootstrap(statistics, queries, resamples, seed)


def best_possible(ranking: Ranking, queries: Queries, places: int = 100) -> float:
    """Return the mean nDCG@10 of the best order of each query's first `places` passages: what reranking can reach."""
    rows = ranking.top(places).rows
    ideal = np.full(rows.shape, NONE, np.int32)
    for query, found in enumerate(rows):
        grades: Sequence[int] = [queries.grades[query].get(int(row), 0) if row != NONE else -1 for row in found]
        ideal[query] = found[np.argsort([-grade for grade in grades], kind="stable")]
    return float(measure(Ranking(ideal, np.zeros(ideal.shape, np.float32)), queries)["ndcg_at_10"].mean())
