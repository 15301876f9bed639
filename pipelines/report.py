"""The evaluation report: one HTML file that needs nothing beside it, and the same tables in Markdown.

No script, no font, no image is loaded: plots are inline SVG, so the page can be mailed, printed and read on a phone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines import attention_page, audit_record, calibration_page, findings, pages, plots, segment_tables, tables
from pipelines.audit_record import Audit
from pipelines.evaluation import OUTSIDE, Evaluation, TrainingSummary
from pipelines.findings import PRIMARY
from pipelines.funnel import Funnel
from pipelines.funnel import tables as funnel_tables
from pipelines.plots import Curve, Point, Series
from pipelines.tables import Table

OUTSIDE_GAUC = f"segment/{OUTSIDE}/{PRIMARY}"

SAMPLERS = {
    "uniform": "every item with training events alike, except those of the request; the user's history is allowed",
    "popularity": "items in proportion to their training events, except those of the request; the user's history is "
    "allowed",
    "never_so_far": "every item with training events alike, except those of the request and of the history so far",
    "in_category": "items of the category of one of the request's positives, except those of the request",
    "impressions": "what was shown in the answer and not taken; nothing is sampled, and scores are not matched",
}
DEFINITIONS = (
    ("AUC", "chance that a positive scores above a negative, over all pairs of all requests; a tie counts one half."),
    ("GAUC", "AUC within each user's candidates, averaged over users with the number of candidates as weight."),
    ("AUC per request", "AUC within each request, averaged over requests."),
    ("NDCG@k", "discounted gain of the first k, 1 / log2(rank + 1) each, over that of the best possible order."),
    ("MRR@k", "1 / rank of the first positive, 0 beyond k."),
    ("Recall@k", "share of a request's positives among its first k; below 1 where it has more than k positives."),
    ("Hit rate@k", "share of requests with a positive among the first k."),
    (
        "Matched scores",
        "a score estimates how likely an item is; against drawn negatives it is compared after subtracting log of how "
        "often the sampler draws the item, for every model alike. The full ranking subtracts nothing.",
    ),
    ("Ties", "are worth their expectation over all orders, so a constant score gets exactly what chance gets."),
    ("Outside the history", "candidates, positive and negative, that do not occur among the user's earlier events."),
    ("In the history", "positives that do, against the same negatives outside the history."),
    (
        "Log loss, calibration error",
        "of 1 / (1 + exp(-score)), the error over 15 bins of equal size; they need real impressions: on sampled "
        "candidates they are not defined.",
    ),
)


@dataclass(frozen=True)
class Plot:
    """An inline SVG and what it shows."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Verdict:
    """What the audit of the data said in a sentence, and whether a reader may go on without a doubt."""

    text: str
    passed: bool


@dataclass(frozen=True)
class Page:
    """All a reader gets, in order."""

    title: str
    audited: Verdict | None
    answer: str
    points: list[str]
    caution: str
    quality: list[Table]
    by_target: list[Table]
    full_ranking: Table | None
    cold_start: Table | None
    calibration: list[Table]
    not_calibrated: str
    exactness: list[Table]
    looks: list[Table]
    by_length: list[Table]
    segments: list[Table]
    funnel: list[Table]
    cost: Table
    data: Table
    audit: list[Table]
    sampling: list[str]
    definitions: list[tuple[str, str]]
    settings: list[tuple[str, list[tuple[str, str]]]]
    plots: dict[str, Plot]


def write_report(
    evaluation: Evaluation,
    training: Mapping[str, TrainingSummary],
    manifest: Mapping[str, Any],
    out: Path,
    audit: Audit | None = None,
    funnel: Funnel | None = None,
) -> None:
    """Write `report.html` and `report.md` into the directory `out`.

    Args:
        evaluation: what was measured.
        training: summaries by model name; models without one have dashes in the cost table.
        manifest: of the prepared set, for the data card.
        out: directory; made if it is not there. Each file is written whole or not at all.
        audit: of the prepared set, if there was one; its verdict stands above everything else.
        funnel: of the published bundle, if there is one.
    """
    page = build_page(evaluation, training, manifest, audit, funnel)
    pages.write(out, {"report.html": render_html(page), "report.md": render_markdown(page)})


def build_page(
    evaluation: Evaluation,
    training: Mapping[str, TrainingSummary],
    manifest: Mapping[str, Any],
    audit: Audit | None = None,
    funnel: Funnel | None = None,
) -> Page:
    """Collect everything the report says; an audit of other data counts as none."""
    current = audit is not None and audit.data_digest == evaluation.data_digest
    samplers = evaluation.config.samplers
    source = manifest.get("source")
    name = source.get("name") if isinstance(source, Mapping) else source
    return Page(
        title=f"Evaluation on {name}" if name else "Evaluation",
        audited=_verdict(audit, current),
        answer=findings.verdict(evaluation),
        points=_points(evaluation),
        caution=findings.caution(evaluation),
        quality=[tables.quality(evaluation, sampler) for sampler in samplers],
        by_target=[tables.by_target(evaluation, sampler) for sampler in samplers],
        full_ranking=tables.full_ranking(evaluation) if "all_items" in evaluation.candidates else None,
        cold_start=tables.cold_start(evaluation.cold_start, evaluation.split) if evaluation.cold_start else None,
        calibration=[calibration_page.table(evaluation)] if evaluation.reliability else [],
        not_calibrated=calibration_page.why_not(evaluation),
        exactness=attention_page.distances(evaluation),
        looks=attention_page.examples(evaluation),
        by_length=[tables.by_length(evaluation, sampler) for sampler in samplers],
        segments=segment_tables.segments(evaluation),
        funnel=funnel_tables(funnel) if funnel is not None else [],
        cost=tables.cost(evaluation, training),
        data=tables.data_card(manifest),
        audit=audit_record.tables(audit) if audit is not None and current else [],
        sampling=[
            f"`{sampler}`: {SAMPLERS.get(sampler, 'see the documentation of this sampler')}." for sampler in samplers
        ],
        definitions=list(DEFINITIONS),
        settings=[(name, _settings(training[name])) for name in evaluation.models if name in training],
        plots=_plots(evaluation, training),
    )


def _points(evaluation: Evaluation) -> list[str]:
    """Return at most five findings: those over all requests, then what segments say."""
    segments = segment_tables.sentence(evaluation)
    return [*findings.points(evaluation), *([segments] if segments else [])]


def _verdict(audit: Audit | None, current: bool) -> Verdict | None:
    if audit is None:
        return None
    if not current:
        return Verdict("The last audit was of other data than this report; run `recsys audit` again.", passed=False)
    return Verdict(audit.verdict, audit.passed)


def render_html(page: Page) -> str:
    """Return the page as one HTML document."""
    return pages.render("report.html.j2", page=page)


def render_markdown(page: Page) -> str:
    """Return the same in Markdown, without plots and settings."""
    parts = [f"# {page.title}", *([f"**{page.audited.text}**"] if page.audited else []), f"**{page.answer}**"]
    parts += ["\n".join(f"- {text}" for text in page.points)] if page.points else []
    parts += [page.caution]
    sections: list[tuple[str, list[Table]]] = [
        ("Quality", page.quality),
        ("Outside and in the history", page.by_target),
        ("All items", [page.full_ranking] if page.full_ranking else []),
        ("New items", [page.cold_start] if page.cold_start else []),
        ("Calibration", page.calibration),
        ("Distance to exact attention", page.exactness),
        ("What models look at", page.looks),
        ("History length", page.by_length),
        ("Segments", page.segments),
        ("The published system", page.funnel),
        ("Cost", [page.cost]),
        ("Data", [page.data]),
        ("Audit", page.audit),
    ]
    for title, found in sections:
        if found:
            parts.append(f"## {title}")
        for table in found:
            parts += [f"### {table.title}"] if table.title != title else []
            parts += [pages.markdown(table), *([table.note] if table.note else [])]
    parts += ["## Calibration", page.not_calibrated] if page.not_calibrated else []
    parts += ["## How negatives were sampled", "\n".join(f"- {line}" for line in page.sampling)]
    parts += ["## Definitions", "\n".join(f"- **{name}**: {text}" for name, text in page.definitions)]
    return "\n\n".join(parts) + "\n"


def _plots(evaluation: Evaluation, training: Mapping[str, TrainingSummary]) -> dict[str, Plot]:
    """Draw what there is something to draw of; the first word of a key is the section."""
    found: dict[str, Plot] = {}
    for sampler in evaluation.config.samplers:
        for section, metric, words in (
            ("quality", PRIMARY, "GAUC"),
            ("outside", OUTSIDE_GAUC, "GAUC outside the history"),
        ):
            order = tables.ordered(evaluation, sampler, metric)
            points = [_point(evaluation, name, sampler, metric) for name in order]
            svg = plots.ranges(f"{section} {sampler}", words, order, [Series(sampler, points)])
            found[f"{section} {sampler}"] = Plot(_caption(evaluation, f"{words}, {sampler} negatives"), svg)
        segments = tables.lengths(evaluation, sampler)
        if len(segments) > 1:
            names = [f"segment/{segment}/{PRIMARY}" for segment, _, _ in segments]
            series = [
                Series(model, [_point(evaluation, model, sampler, name) for name in names])
                for model in evaluation.models
            ]
            lengths = [words for _, words, _ in segments]
            svg = plots.lines(f"length {sampler}", "events before the request", "GAUC", lengths, series)
            caption = f"GAUC by events before the request, {sampler} negatives"
            found[f"length {sampler}"] = Plot(_caption(evaluation, caption), svg)
    for name, (caption, svg) in calibration_page.figures(evaluation).items() if evaluation.reliability else ():
        found[f"reliability {name}"] = Plot(_caption(evaluation, caption.removesuffix(".")), svg)
    first = evaluation.config.samplers[0]
    timed = [(name, one.p50_ms) for name, one in evaluation.cost.items() if one.p50_ms]
    if len(timed) > 1:
        y = [_point(evaluation, name, first, PRIMARY) for name, _ in timed]
        names, x = [name for name, _ in timed], [ms for _, ms in timed]
        svg = plots.scatter("latency", "milliseconds per single request (p50)", "GAUC", names, x, y)
        found["latency"] = Plot(_caption(evaluation, f"Quality against latency: GAUC, {first} negatives"), svg)
    curves = [_curve(training[name], place) for place, name in enumerate(evaluation.models) if name in training]
    drawn = [curve for curve in curves if len(curve.x) > 1]
    if drawn:
        svg = plots.curves("curves", "step", "validation GAUC", drawn)
        found["curves"] = Plot("GAUC on validation requests while training.", svg)
    return found


def _caption(evaluation: Evaluation, text: str) -> str:
    return f"{text}, with {100 * evaluation.config.level:g} % intervals." if evaluation.config.resamples else f"{text}."


def _point(evaluation: Evaluation, name: str, sampler: str, metric: str) -> Point:
    return Point(evaluation.metric(name, sampler, metric), evaluation.interval(name, sampler, metric))


def _curve(summary: TrainingSummary, place: int) -> Curve:
    known = [entry for entry in summary.curve if "step" in entry and f"valid/{PRIMARY}" in entry]
    steps, values = [entry["step"] for entry in known], [entry[f"valid/{PRIMARY}"] for entry in known]
    return Curve(summary.model, steps, values, place)


def _settings(summary: TrainingSummary) -> list[tuple[str, str]]:
    """Return a run's configuration as (dotted key, value)."""

    def flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
        rows: list[tuple[str, str]] = []
        for key, value in values.items():
            rows += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, str(value))]
        return rows

    return flat(summary.config, "")
