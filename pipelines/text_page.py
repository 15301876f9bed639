"""What an evaluation of text models says to a person: a sentence per model, tables, queries won and lost by most."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import pages, plots
from pipelines.plots import Point, Series
from pipelines.tables import Cell, Table
from pipelines.text_measures import MEASURES, Comparison, mean_of
from recsys.bootstrap import Estimate

if TYPE_CHECKING:
    from pipelines.text_evaluate import TaskResult

SHOWN = 5
"""Queries shown that a model won, and lost, by most."""
LONGEST = 160
"""Characters shown of a query."""


@dataclass(frozen=True)
class Examples:
    """Queries a model won and lost by most: nDCG@10 gained, and the words."""

    title: str
    won: list[tuple[str, str]]
    lost: list[tuple[str, str]]


@dataclass(frozen=True)
class TaskPart:
    """All that is said of one set of queries."""

    name: str
    table: Table
    plot: str
    examples: list[Examples]


@dataclass(frozen=True)
class TextPage:
    """All a reader gets, in order."""

    title: str
    facts: list[str]
    summary: list[str]
    tasks: list[TaskPart]


def build_page(results: Sequence["TaskResult"], about: Mapping[str, Any]) -> TextPage:
    """Collect everything the page says."""
    return TextPage(
        f"Text models on {about['corpus']}",
        [f"{key}: {value}" for key, value in about.items() if key != "corpus"],
        [sentence(result, name, found) for result in results for name, found in result.against_baseline().items()],
        [TaskPart(one.name, _table(one), _plot(one), _examples(one)) for one in results],
    )


def sentence(result: "TaskResult", name: str, found: Comparison) -> str:
    """Say whether a model is better than the first stage it starts from on one task."""
    low, high = found.difference.interval()  # NaN of a few queries, which tell nothing apart
    base = result.baseline[name]
    word = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
    bounds = "no interval" if math.isnan(low) else f"[{points(low)}, {points(high)}]"
    return (
        f"{result.name}: `{name}` is {word} `{base}`: nDCG@10 {points(found.difference.value)} "
        f"{bounds}, {found.won} queries won, {found.lost} lost, {found.tied} alike."
    )


def points(value: float) -> str:
    """Return a difference in points of a hundred, with a true minus."""
    return f"{100 * value:+.1f}".replace("-", "−")


def write_page(results: Sequence["TaskResult"], about: Mapping[str, Any], directory: Path) -> Path:
    """Write `report.html` and `report.md`, each whole or not at all; gives the path of the former."""
    page = build_page(results, about)
    texts = {"report.html": pages.render("text.html.j2", page=page), "report.md": render_markdown(page)}
    pages.write(directory, texts)
    return directory / "report.html"


def render_markdown(page: TextPage) -> str:
    """Return the page in Markdown."""
    parts = [f"# {page.title}", "  \n".join(page.facts), *page.summary]
    for task in page.tasks:
        parts += [f"## {task.name}", task.table.title, pages.markdown(task.table), task.table.note]
        for one in task.examples:
            parts += [f"### {one.title}", "\n".join(f"- {gain} {text}" for gain, text in [*one.won, *one.lost])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(result: "TaskResult") -> Table:
    found = result.against_baseline()
    measured = {name: mean_of(values) for name, values in result.values.items()}
    best = {key: max(one[key].value for one in measured.values()) for key in MEASURES}
    rows = []
    for name, values in measured.items():
        cells = [Cell(name)]
        for key, estimate in values.items():
            bounds = _ends(estimate, lambda end: f"{100 * end:.1f}", "–")
            cells.append(Cell(f"{100 * estimate.value:.1f}", bounds, estimate.value == best[key]))
        if name in found:
            gain = f"{result.baseline[name]} {points(found[name].difference.value)}"
            cells += [
                Cell(gain, _ends(found[name].difference, points, " to ")),
                Cell(f"{found[name].won} / {found[name].lost} / {found[name].tied}"),
            ]
        else:
            cells += [Cell("–"), Cell("–")]
        rows.append(tuple(cells))
    header = ("System", *MEASURES.values(), "nDCG@10 against", "won / lost / alike")
    title = f"{len(result.queries):,} queries, percent, 95 % over queries"
    note = f"The best order of the first stage's best 100 would have an nDCG@10 of {100 * result.best_possible:.1f}."
    return Table(title, header, tuple(rows), note)


def _ends(estimate: Estimate, words: Callable[[float], str], between: str) -> str:
    """Return the ends of an interval in words, nothing where there is none."""
    low, high = estimate.interval()
    return "" if math.isnan(low) else f"{words(low)}{between}{words(high)}"


def _plot(result: "TaskResult") -> str:
    found = result.against_baseline()
    if not found:
        return ""
    estimates = [one.difference for one in found.values()]
    marks = [Point(one.value, None if math.isnan(one.interval()[0]) else one.interval()) for one in estimates]
    names = [f"{name} − {result.baseline[name]}" for name in found]
    title = f"nDCG@10 gained on {result.name}"
    return plots.ranges(title, "difference in nDCG@10", names, [Series("difference", marks)], zero=True)


def _examples(result: "TaskResult") -> list[Examples]:
    made = []
    for name, base in result.baseline.items():
        gain = result.values[name]["ndcg_at_10"] - result.values[base]["ndcg_at_10"]
        order = gain.argsort(kind="stable")
        shown = {place: (f"{gain[place]:+.2f}", result.queries.texts[place][:LONGEST]) for place in order.tolist()}
        won = [shown[place] for place in order[::-1][:SHOWN].tolist() if gain[place] > 0]
        lost = [shown[place] for place in order[:SHOWN].tolist() if gain[place] < 0]
        if won or lost:
            made.append(Examples(f"Queries that {name} won and lost against {base} by most", won, lost))
    return made
