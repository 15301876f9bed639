"""Render the results as Markdown: tables of mean and deviation over seeds, and the differences that are claimed.

    python tests/benchmarks/studies/tables.py                  # to stdout, and to results/tables.md

An interval of a difference is that of `recsys compare` on methods (`pipelines.verdicts`): over users, drawn once for
both models, and over the seeds of each, few as they are. A side with one seed counts as certain. A cell without a
result says "not run yet".
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.studies.measure import Vectors, load_vectors  # noqa: E402
from benchmarks.studies.plan import STUDIES, Cell, Claim, Study, cells  # noqa: E402

from pipelines.leave_one_out import CUTS, Ranks  # noqa: E402
from pipelines.verdicts import between_methods  # noqa: E402
from recsys.bootstrap import Estimate, Ratio, bootstrap  # noqa: E402
from recsys.errors import DataError  # noqa: E402
from recsys.files import read_json, whole_file  # noqa: E402

RESAMPLES = 2000
MISSING = "not run yet"
OUTSIDE = "segment/target_outside_history/gauc"
FULL = "all_items/ndcg_at_10"


@dataclass(frozen=True)
class Result:
    """A cell that was run."""

    cell: Cell
    record: dict[str, Any]
    vectors: Path

    def metric(self, name: str) -> float | None:
        """Return one figure of the test split."""
        sampler, _, metric = name.partition("/")
        value = self.record["metrics"].get(f"test/{sampler}/{metric}" if metric else name)
        return None if value is None else float(value)

    def ratio(self, name: str) -> Ratio:
        """Return what the figure is a mean of, by user; raises `DataError` if it was not kept."""
        kept = load_vectors(self.vectors)
        if "rank" in kept:
            return _ratio_of_ranks(kept, name)
        if f"{name}|above" not in kept:
            raise DataError(f"{self.vectors}: no values by user of {name}")
        return Ratio(kept[f"{name}|above"].astype(np.float64), kept[f"{name}|below"].astype(np.float64))


def _ratio_of_ranks(kept: Vectors, name: str) -> Ratio:
    rank = kept["rank"].astype(np.int64)
    return Ratio(Ranks(np.arange(len(rank)), rank).gains()[name], np.ones(len(rank)))


def results_of(directory: Path) -> dict[tuple[str, str, str], list[Result]]:
    """Read what there is: (study, data set, row) -> its seeds, in order."""
    found: dict[tuple[str, str, str], list[Result]] = {}
    for cell in sorted(cells(), key=lambda cell: cell.seed):
        path = directory / cell.study / f"{cell.name}.json"
        if path.exists():
            one = Result(cell, read_json(path), path.with_suffix(".npz"))
            found.setdefault((cell.study, cell.dataset, cell.model), []).append(one)
    return found


def spread(values: Sequence[float | None], digits: int) -> str:
    """Return mean and standard deviation over seeds; the value alone of one seed."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def difference(ours: Sequence[Result], theirs: Sequence[Result], metric: str) -> tuple[float, float, float]:
    """Return the mean difference over seeds and its 95 % interval over users and seeds."""
    digests = {one.record["data"]["digest"] for one in (*ours, *theirs)}
    if len(digests) > 1:
        raise DataError(f"{metric}: results of different data can't be paired: {', '.join(sorted(digests))}")
    first, second = ([_estimate(one, metric) for one in side] for side in (ours, theirs))
    low, high, _ = between_methods(first, second)
    mean, other = (statistics.fmean(one.value for one in side) for side in (first, second))
    return mean - other, low, high


def _estimate(result: Result, metric: str) -> Estimate:
    ratio = result.ratio(metric)
    return bootstrap({metric: ratio}, len(ratio.numerator), RESAMPLES, 2023)[metric]


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def candidates_table(study: Study, found: Mapping[str, Sequence[Result]], sampler: str) -> list[str]:
    """Return the figures against one sampler's negatives."""
    names = (f"{sampler}/auc", f"{sampler}/gauc", f"{sampler}/ndcg_at_10", f"{sampler}/{OUTSIDE}")

    def rows() -> Iterator[list[str]]:
        for row in study.rows:
            seeds = found.get(row, [])
            cells_ = (
                [spread([one.metric(name) for one in seeds], 4) for name in names] if seeds else [MISSING] * len(names)
            )
            yield [f"`{row}`", str(len(seeds)), *cells_]

    return table(["model", "seeds", "AUC", "GAUC", "NDCG@10", "GAUC, targets outside the history"], rows())


def cost_table(study: Study, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return the ranking of all items and what a model takes."""

    def rows() -> Iterator[list[str]]:
        for row in study.rows:
            seeds = found.get(row, [])
            if not seeds:
                yield [f"`{row}`", *[MISSING] * 5]
                continue
            training, cost = [one.record["training"] for one in seeds], [one.record["cost"] for one in seeds]
            yield [
                f"`{row}`",
                *(
                    spread([one.metric(f"all_items/{name}") for one in seeds], 4)
                    for name in ("ndcg_at_10", "recall_at_50")
                ),
                f"{training[0]['parameters']:,}",
                spread([one["seconds"] for one in training], 0),
                spread([one["ms_per_request"] for one in cost], 2),
            ]

    return table(
        ["model", "NDCG@10, all items", "Recall@50, all items", "parameters", "training s", "ms per request"], rows()
    )


def segments_table(study: Study, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return GAUC against uniform negatives for users by length of history and positives by popularity."""
    names = [f"uniform/segment/{name}/gauc" for name in study.segments]

    def rows() -> Iterator[list[str]]:
        for row in study.rows:
            seeds = found.get(row, [])
            yield [
                f"`{row}`",
                *(spread([one.metric(name) for one in seeds], 4) if seeds else MISSING for name in names),
            ]

    return table(["model", *(name.replace("_", " ") for name in study.segments)], rows())


def agreement(study: Study, found: Mapping[str, Sequence[Result]], sampler: str) -> str:
    """Say how far the order of the models by sampled NDCG@10 is that of the full ranking."""
    pairs = [
        [statistics.fmean(one.metric(name) or 0.0 for one in found[row]) for name in (f"{sampler}/ndcg_at_10", FULL)]
        for row in study.rows
        if row in found
    ]
    if len(pairs) < 3:
        return f"Kendall's tau of the models' order, {sampler} against all items: {MISSING}."
    tau = kendalltau(*zip(*pairs, strict=True)).statistic
    return f"Kendall's tau of the order of {len(pairs)} models by NDCG@10, `{sampler}` against all items: {tau:.2f}."


def paper_tables(study: Study, results: Mapping[tuple[str, str, str], list[Result]], name: str) -> list[str]:
    """Return one table per data set of a study under leave_one_out."""
    lines: list[str] = []
    planned = [cell for cell in cells() if cell.study == name]
    for dataset in dict.fromkeys(cell.dataset for cell in planned):
        heads = [f"{metric}@{cut}" for cut in CUTS for metric in ("HR", "NDCG")]

        def rows(dataset: str = dataset) -> Iterator[list[str]]:
            for row in (
                row for row in study.rows if any((cell.dataset, cell.model) == (dataset, row) for cell in planned)
            ):
                seeds = results.get((name, dataset, row), [])
                keys = [f"{metric}_at_{cut}" for cut in CUTS for metric in ("hr", "ndcg")]
                figures = (
                    [spread([one.metric(key) for one in seeds], 4) for key in keys] if seeds else [MISSING] * len(keys)
                )
                yield [f"{row}", str(len(seeds)), *figures, _epochs(seeds)]

        sets = prepared_sets(
            {row: seeds for (home, of, row), seeds in results.items() if (home, of) == (name, dataset)}
        )
        lines += [f"**{dataset}**", "", *table(["model", "seeds", *heads, "best epoch of"], rows()), "", sets, ""]
    return lines


def _epochs(seeds: Sequence[Result]) -> str:
    told = []
    for one in seeds:
        training, every = one.record["training"], one.record["config"]["stop"]["validate_every"]
        if training["steps"]:
            told.append(f"{training['best_step'] // every} of {training['steps'] // every}")
    return ", ".join(told) or "–"


def claims(study: Study, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Return the differences that are claimed, with their intervals."""

    def rows() -> Iterator[list[str]]:
        for claim in study.claims:
            yield [f"`{claim.model}` – `{claim.other}`", claim.metric, *_judged(claim, found), claim.says]

    return table(["difference", "metric", "mean [95 %]", "seeds", "verdict", "expected by"], rows())


def _judged(claim: Claim, found: Mapping[str, Sequence[Result]]) -> list[str]:
    ours, theirs = found.get(claim.model, []), found.get(claim.other, [])
    if not ours or not theirs:
        return [MISSING, "–", "–"]
    mean, low, high = difference(ours, theirs, claim.metric)
    verdict = "no difference found" if low <= 0 <= high else "above" if low > 0 else "below"
    seeds = f"{len(ours)} and {len(theirs)}"
    return [f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", seeds, verdict]


def render(results: Mapping[tuple[str, str, str], list[Result]]) -> str:
    """Return all tables."""
    lines = ["# Studies", "", "Made by `python tests/benchmarks/studies/tables.py` from the JSON beside it.", ""]
    for name, study in STUDIES.items():
        found = {
            row: seeds for (home, dataset, row), seeds in results.items() if (home, dataset) == (name, study.dataset)
        }
        planned = [cell for cell in cells() if cell.study == name]
        count = sum(len(seeds) for (home, *_), seeds in results.items() if home == name)
        lines += [f"## {study.title}", "", study.about, "", f"Cells run: {count} of {len(planned)}.", ""]
        if planned[0].protocol == "leave_one_out":
            lines += paper_tables(study, results, name)
        else:
            for sampler in ("uniform", "popularity"):
                lines += [
                    f"Against `{sampler}` negatives{_facts(found, sampler)}:",
                    "",
                    *candidates_table(study, found, sampler),
                    "",
                ]
            lines += [
                f"All items ranked for {_ranked(found)} of these requests, and cost:",
                "",
                *cost_table(study, found),
                "",
            ]
            if study.segments:
                lines += ["GAUC by segment, `uniform` negatives:", "", *segments_table(study, found), ""]
            lines += [agreement(study, found, sampler) for sampler in ("uniform", "popularity")]
            lines += ["", prepared_sets(found), ""]
        if study.claims:
            lines += ["Differences:", "", *claims(study, found), ""]
    return "\n".join(lines)


def prepared_sets(found: Mapping[str, Sequence[Result]]) -> str:
    """Say by digest which prepared set the rows are of, and which commits ran them (+: with changes)."""
    rows: dict[str, list[str]] = {}
    for row, seeds in found.items():
        for one in seeds:
            rows.setdefault(one.record["data"]["digest"][:8], []).append(row)
    if not rows:
        return f"Prepared set: {MISSING}."
    commits = sorted({_short(one.record["commit"]) for seeds in found.values() for one in seeds})
    told = (f"`{digest}` ({', '.join(dict.fromkeys(names))})" for digest, names in rows.items())
    sets = f"`{next(iter(rows))}`, all rows" if len(rows) == 1 else "; ".join(told)
    return f"Prepared set: {sets}. Run at {', '.join(commits)}."


def _short(commit: str) -> str:
    """Return the first seven digits of a commit, and `+` where files were changed since."""
    return commit[:7] + "+" * commit.endswith("-dirty")


def _facts(found: Mapping[str, Sequence[Result]], sampler: str) -> str:
    for seeds in found.values():
        facts = seeds[0].record["candidates"][sampler]
        ours, others = facts["positives_in_history"], facts["negatives_in_history"]
        inside = f"{ours:.1%} of the positives and {others:.1%} of the negatives are in the history"
        return f" ({facts['requests']:,} requests of {facts['users']:,} users; {inside})"
    return ""


def _ranked(found: Mapping[str, Sequence[Result]]) -> str:
    for seeds in found.values():
        return f"{seeds[0].record['candidates']['all_items']['requests']:,}"
    return "some"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    text = render(results_of(options.results))
    with whole_file(options.results / "tables.md") as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
