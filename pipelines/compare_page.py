"""What a comparison says to a person: a summary in words, the verdicts that decide, then what is exploratory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from pipelines import pages, plots
from pipelines.compare import Compared
from pipelines.findings import NAMES, listed, number, percent, signed
from pipelines.plots import Point, Series
from pipelines.tables import Cell, Table
from pipelines.verdicts import Verdict

HEADER = ("Model", "against", "Verdict", "Difference", "Users it would take")
MOST_PAIRS = 12
"""Pairs that are drawn, those of the best model first; the table holds all."""


@dataclass(frozen=True)
class ComparePage:
    """All a reader gets, in order."""

    title: str
    summary: list[str]
    plot: str
    decisive: list[Table]
    exploratory: list[Table]


def build_page(found: Compared) -> ComparePage:
    """Collect everything the page says."""
    metric = NAMES.get(found.config.metric, found.config.metric)
    decisive = [_values(found, metric), _table(f"Verdicts on {metric}, the primary metric", found.primary)]
    if found.config.segments:
        share = 100 * (1 - (1 - found.config.level) / len(found.config.segments))
        note = f"GAUC in the segments named beforehand, at {share:.4g} % each, so that together they err as one does."
        decisive.append(_table("Verdicts by segment", found.segments, note, segment=True))
    if found.twins:
        note = "Two files of one method differ by the luck of the seed: any other verdict is a false one."
        decisive.append(_table("Twins: the same configuration, other seeds", found.twins, note))
    exploratory = [
        _table(name, list(part)) for name, part in groupby(found.exploratory, lambda verdict: verdict.segment)
    ]
    return ComparePage(
        f"Comparison of {listed(list(found.values))}",
        summary(found, metric),
        _plot(found, metric),
        decisive,
        exploratory,
    )


def summary(found: Compared, metric: str) -> list[str]:
    """Return what to know in a minute, the verdict first; `backticks` mark names."""
    config = found.config
    lines = [
        conclusion(found, metric),
        f"On {found.requests:,} `{config.split}` requests of {found.users:,} users, against `{config.sampler}` "
        f"negatives, paired by user; {metric} over all requests decides.",
    ]
    if found.config.segments and found.primary:
        lines.append(f"Of the {len(found.config.segments)} segments named beforehand, {_in_segments(found)}.")
    if found.agrees is not None:
        lines.append(f"Of {len(found.twins)} pairs of twins {percent(found.agrees)} come out cannot tell.")
    if found.not_defined:
        lines.append(f"Without a positive, so not defined: {listed([f'`{name}`' for name in found.not_defined])}.")
    lines.append(
        f"Each verdict errs in {100 * (1 - config.level):.3g} % of cases where nothing differs; {len(found.primary)} "
        "pairs were looked at. A verdict on two files does not cover the luck of a training seed; one on methods does. "
        f"{len({v.segment for v in found.exploratory})} further segments are exploratory: they decide nothing."
    )
    return lines


def conclusion(found: Compared, metric: str) -> str:
    """Return the verdict on the best model in one sentence, of two models with its numbers."""
    if not found.primary:
        return "All runs are seeds of one method: there is nothing to decide."
    if len(found.primary) == 1:
        return sentence(_from_best(found, found.primary[0]), metric)
    name = _best(found)
    ours = [_from_best(found, one) for one in found.primary if name in (one.model, one.other)]
    parts = []
    words = {"better": "is better than", "worse": "is worse than", "cannot tell": "cannot be told from"}
    for word, text in words.items():
        others = [one for one in ours if one.word == word]
        if others:
            parts.append(f"{text} {listed([f'`{one.other}`' for one in others])}{_needed(others)}")
    what = " as a method" if ours[0].kind == "methods" else ""
    value = number(found.values[name][found.config.metric])
    return f"`{name}` has the highest {metric}, {value}; it {', and '.join(parts) or 'is compared with none'}{what}."


def _in_segments(found: Compared) -> str:
    """Say in which segments named beforehand another model is better than the best."""
    name = _best(found)
    ours = [_from_best(found, one) for one in found.segments if name in (one.model, one.other)]
    lost = [one for one in ours if one.word == "worse"]
    if not lost:
        return f"in none a model is better than `{name}`"
    few = "; ".join(f"in `{one.segment}` `{one.other}` is better by {_difference(one.turned)}" for one in lost[:2])
    return few + (f", and so are {len(lost) - 2} more" if len(lost) > 2 else "")


def _best(found: Compared) -> str:
    names = dict.fromkeys(name for one in found.primary for name in (one.model, one.other))
    values = {name: found.values[name][found.config.metric] for name in names}
    return max(values, key=lambda name: -np.inf if values[name] is None else (values[name] or 0.0))


def _from_best(found: Compared, one: Verdict) -> Verdict:
    """Return a verdict read from the side of the best model, if it is about that."""
    return one.turned if one.other == _best(found) else one


def _needed(others: Sequence[Verdict]) -> str:
    """Say how many users would tell each of some models apart."""
    needed = [one.users_needed for one in others if one.users_needed]
    return f" (it would take about {max(needed):,} users)" if needed else ""


def sentence(verdict: Verdict, metric: str) -> str:
    """Say one verdict."""
    what = {"files": "", "twins": "", "methods": " as a method"}[verdict.kind]
    if verdict.word == "not defined":
        return f"`{verdict.model}` against `{verdict.other}` is not defined: {verdict.why}."
    size = f"{metric} {_difference(verdict)}"
    if verdict.word == "cannot tell":
        needed = f" It would take about {verdict.users_needed:,} users." if verdict.users_needed else ""
        why = f" ({verdict.why})" if verdict.why else ""
        return f"Cannot tell `{verdict.model}` from `{verdict.other}`{what}: {size}{why}.{needed}"
    return f"`{verdict.model}` is {verdict.word} than `{verdict.other}`{what}: {size}."


def write_page(found: Compared, directory: Path) -> None:
    """Write `compare.html` and `compare.md`, each whole or not at all."""
    page = build_page(found)
    texts = {"compare.html": pages.render("compare.html.j2", page=page), "compare.md": render_markdown(page)}
    pages.write(directory, texts)


def render_markdown(page: ComparePage) -> str:
    """Return the page in Markdown."""
    parts = [f"# {page.title}", *page.summary]
    for table in page.decisive:
        parts += [f"## {table.title}", pages.markdown(table), *([table.note] if table.note else [])]
    if page.exploratory:
        parts.append("## Exploratory")
    for table in page.exploratory:
        parts += [f"### {table.title}", pages.markdown(table)]
    return "\n\n".join(parts) + "\n"


def _values(found: Compared, metric: str) -> Table:
    names = sorted(found.values, key=lambda name: -(found.values[name][found.config.metric] or 0.0))
    method = {run: leader for leader, runs in found.methods.items() for run in runs}
    rows = [
        (
            Cell(name),
            Cell(number(found.values[name][found.config.metric]), best=place == 0),
            Cell(method[name] if len(found.methods[method[name]]) > 1 else "–"),
        )
        for place, name in enumerate(names)
    ]
    return Table("Values", ("Run", metric, "seeds of"), tuple(rows))


def _table(title: str, verdicts: Sequence[Verdict], note: str = "", segment: bool = False) -> Table:
    rows = []
    for verdict in verdicts:
        needed = f"{verdict.users_needed:,}" if verdict.users_needed else "–"
        cells = [
            Cell(verdict.model),
            Cell(verdict.other),
            Cell(verdict.word, best=verdict.word in ("better", "worse")),
            Cell(signed(verdict.difference) if verdict.difference is not None else "–", _bounds(verdict)),
            Cell(needed),
        ]
        rows.append(tuple([Cell(verdict.segment), *cells] if segment else cells))
    return Table(title, ("Segment", *HEADER) if segment else HEADER, tuple(rows), note)


def _plot(found: Compared, metric: str) -> str:
    """Draw the differences of the primary metric with their intervals."""
    known = [_from_best(found, one) for one in found.primary if one.difference is not None]
    if not known:
        return ""
    best = _best(found)
    known = sorted(known, key=lambda one: one.model != best)[:MOST_PAIRS]
    points = [
        Point(v.difference, None if v.ci_low is None or v.ci_high is None else (v.ci_low, v.ci_high)) for v in known
    ]
    names = [f"{_shortened(verdict.model)} − {_shortened(verdict.other)}" for verdict in known]
    return plots.ranges("differences", f"difference in {metric}", names, [Series("difference", points)], zero=True)


def _shortened(name: str) -> str:
    """Return the end of a long name, such as a path."""
    return name if len(name) <= 20 else f"…{name[-19:]}"


def _difference(verdict: Verdict) -> str:
    bounds = _bounds(verdict)
    value = signed(verdict.difference or 0.0)
    return f"{value} [{bounds}]" if bounds else value


def _bounds(verdict: Verdict) -> str:
    if verdict.ci_low is None or verdict.ci_high is None:
        return ""
    return f"{signed(verdict.ci_low)} to {signed(verdict.ci_high)}"
