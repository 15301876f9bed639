"""The report's tables as plain data, before anybody says HTML or Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipelines.evaluation import ALL_ITEMS, INSIDE, OUTSIDE, ColdStart, Evaluation, TrainingSummary, length_segments
from pipelines.findings import PRIMARY, best, conditions, difference, interval, number, percent
from pipelines.prepared import IMPRESSIONS
from recsys.history import POSITIONS

COLUMNS = (
    ("gauc", "GAUC"),
    ("auc", "AUC"),
    ("auc_per_request", "AUC per request"),
    ("ndcg_at_10", "NDCG@10"),
    ("mrr_at_10", "MRR@10"),
    ("recall_at_10", "Recall@10"),
    ("recall_at_50", "Recall@50"),
)
ALL_ITEMS_COLUMNS = (
    ("ndcg_at_10", "NDCG@10"),
    ("mrr_at_10", "MRR@10"),
    ("hit_rate_at_10", "Hit rate@10"),
    ("recall_at_10", "Recall@10"),
    ("recall_at_50", "Recall@50"),
)


@dataclass(frozen=True)
class Cell:
    """One value, what stands small below it (its interval), and whether it is the best of its column."""

    text: str
    below: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its heading and a note; the first column names the row. `backticks` in the note mark names.

    `words` says that cells hold names, which may be broken over lines, not numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    words: bool = False


def quality(evaluation: Evaluation, sampler: str) -> Table:
    """Return all metrics of all models on one sampler, best GAUC first, with the paired difference from the best."""
    leader = best(evaluation, sampler, PRIMARY)
    rows = []
    for name in ordered(evaluation, sampler, PRIMARY):
        found = None if leader is None or name == leader else evaluation.compare(sampler, PRIMARY, name, leader)
        beside = Cell("–") if found is None else Cell(*_split(difference(found)))
        first, *others = _cells(evaluation, name, sampler, COLUMNS)
        rows.append((Cell(name), first, beside, *others))
    header = ("Model", COLUMNS[0][1], "from the best", *(title for _, title in COLUMNS[1:]))
    return Table(f"Against {sampler} negatives", header, tuple(rows), _note(evaluation, sampler))


def by_target(evaluation: Evaluation, sampler: str) -> Table:
    """Return AUC and GAUC apart for targets in and outside the history."""
    columns = [
        (f"segment/{segment}/{metric}", f"{title} {words}")
        for segment, words in ((OUTSIDE, "outside"), (INSIDE, "in history"))
        for metric, title in (("auc", "AUC"), ("gauc", "GAUC"))
    ]
    names = ordered(evaluation, sampler, columns[1][0])
    rows = tuple((Cell(name), *_cells(evaluation, name, sampler, columns)) for name in names)
    some = names[0] if names else ""
    sizes = []
    for segment, words in ((OUTSIDE, "outside"), (INSIDE, "in history")):
        requests, one_class = (
            int(evaluation.metric(some, sampler, f"segment/{segment}/{count}") or 0)
            for count in ("n_requests", "auc_per_request.skipped")
        )
        sizes.append(f"{words}, {requests:,} requests, {one_class:,} of them of one class")
    note = (
        "Negatives are those outside the history in both; targets are the positives outside it, or in it. "
        f"Size: {'; '.join(sizes)}. {conditions(evaluation.candidates[sampler], sampler, evaluation.split)}"
    )
    return Table(f"Targets outside and in the history, {sampler} negatives", _header(columns), rows, note)


def full_ranking(evaluation: Evaluation) -> Table:
    """Return the ranking of all known items."""
    rows = tuple(
        (Cell(name), *_cells(evaluation, name, ALL_ITEMS, ALL_ITEMS_COLUMNS))
        for name in ordered(evaluation, ALL_ITEMS, "ndcg_at_10")
    )
    note = _note(evaluation, ALL_ITEMS)
    for one in evaluation.agreement:
        if one.models > 1:
            tau = "not defined" if one.tau is None else f"{one.tau:+.2f}".replace("-", "−")
            note += f" Kendall's tau between this order of the {one.models} models and that against `{one.sampler}` "
            note += f"negatives, by NDCG@10 on the same {one.requests:,} requests: {tau}."
    return Table("Ranking all items", _header(ALL_ITEMS_COLUMNS), rows, note)


def by_length(evaluation: Evaluation, sampler: str) -> Table:
    """Return GAUC by the number of events before the request."""
    segments = lengths(evaluation, sampler)
    columns = [(f"segment/{name}/{PRIMARY}", words) for name, words, _ in segments]
    rows = [(Cell(name), *_cells(evaluation, name, sampler, columns)) for name in ordered(evaluation, sampler, PRIMARY)]
    rows.append((Cell("requests"), *(Cell(f"{requests:,}") for _, _, requests in segments)))
    note = conditions(evaluation.candidates[sampler], sampler, evaluation.split)
    return Table(f"GAUC by events before the request, {sampler} negatives", _header(columns), tuple(rows), note)


def cold_start(found: ColdStart, split: str) -> Table:
    """Return how well items without training events are found, best AUC first."""
    names = sorted(found.scores, key=lambda name: -found.scores[name].auc)
    top = {key: max(getattr(score, key) for score in found.scores.values()) for key in ("auc", "recall_at_50")}
    rows = []
    for name in names:
        score = found.scores[name]
        bounds = [
            None if low is None or high is None else (low, high)
            for low, high in ((score.auc_low, score.auc_high), (score.recall_low, score.recall_high))
        ]
        rows.append(
            (
                Cell(name),
                Cell(number(score.auc), interval(bounds[0]), score.auc == top["auc"]),
                Cell(number(score.recall_at_50), interval(bounds[1]), score.recall_at_50 == top["recall_at_50"]),
                Cell(number(score.recall_at_100_of_all)),
            )
        )
    note = (
        f"Split `{split}`: {found.requests:,} requests of {found.users:,} users with {found.targets:,} positives "
        f"without training events; the candidates are all {found.items:,} such items of the catalogue. The last column "
        "ranks all items by a retriever's vectors. `popular` and `own` order by the item's category (the best column): "
        "by its training events, and by the user's own events in it."
    )
    for name, told in found.content.items():
        note += (
            f" For {told.items:,} trained items held out, content explains {percent(max(told.r2, 0.0))} of what sets "
            f"their `{name}` vectors apart from the mean, and {percent(told.recall_at_10)} of them are among the 10 "
            f"nearest to what it predicts (chance: {percent(told.chance_at_10)})"
        )
        note += "." if told.useful else ": not enough, so vectors from content are not used."
    header = ("Scorer", "AUC", "Recall@50", "Recall@100 of all")
    return Table("Items without training events", header, tuple(rows), note)


def cost(evaluation: Evaluation, training: Mapping[str, TrainingSummary]) -> Table:
    """Return what training and scoring took, in the order of GAUC."""
    header = (
        "Model",
        "Parameters",
        "Train s",
        "Steps",
        "Best step",
        "s per epoch",
        "Samples/s",
        "Peak MiB",
        "MB",
        "p50 ms",
        "ms/request",
    )
    rows = []
    for name in ordered(evaluation, evaluation.config.samplers[0], PRIMARY):
        one, scoring = training.get(name), evaluation.cost.get(name)
        trained = one is not None and one.steps > 0
        cells = [Cell(name), Cell(f"{one.parameters:,}" if one else "–")]
        if one and trained:
            cells += [
                Cell(_short(one.seconds)),
                Cell(f"{one.steps:,}"),
                Cell(f"{one.best_step:,}"),
                Cell(_short(one.seconds_per_epoch)),
                Cell(f"{one.samples_per_second:,.0f}"),
                Cell(f"{one.peak_memory_bytes / 2**20:,.0f}" if one.peak_memory_bytes else "–"),
            ]
        else:
            cells += [Cell("–")] * 6
        size, single = (scoring.bytes, scoring.p50_ms) if scoring else (None, None)
        cells += [Cell("–" if size is None else f"{size / 1e6:,.1f}"), Cell("–" if single is None else _short(single))]
        rows.append((*cells, Cell(_short(scoring.ms_per_request) if scoring else "–")))
    return Table("Cost", header, tuple(rows), _cost_note(evaluation, training))


def data_card(manifest: Mapping[str, Any]) -> Table:
    """Return what is known of the prepared set; what its manifest does not say is left out."""
    counts = {**manifest.get("counts", {})}
    rows: list[tuple[str, str]] = []
    source = manifest.get("source")
    if source:
        rows.append(("Source", str(source["name"]) if isinstance(source, Mapping) else str(source)))
        if isinstance(source, Mapping) and source.get("note"):
            rows.append(("Note", str(source["note"])))
    rows += [(_words(name), _count(value)) for name, value in _flat(counts)]
    span = manifest.get("time") or {}
    if {"first", "last"} <= set(span):
        rows.append(("Events from", _period(span["first"], span["last"])))
    for name, value in (manifest.get("cuts") or {}).items():
        rows.append((f"{name.capitalize()} period starts", f"{_moment(value)} (UTC)"))
    kind = ((manifest.get("config") or {}).get("split") or {}).get("kind")
    if kind:
        rows.append(("Split", {"time": "global time", "last_request": "each user's last request"}.get(kind, str(kind))))
    quantiles = manifest.get("history_length") or {}
    if quantiles:
        rows.append(("Events per user", ", ".join(f"{name} {_count(value)}" for name, value in _quantiles(quantiles))))
    if "digest" in manifest:
        rows.append(("Digest", str(manifest["digest"])[:16]))
    return Table("Data", ("", ""), tuple((Cell(name), Cell(value)) for name, value in rows))


def lengths(evaluation: Evaluation, sampler: str) -> list[tuple[str, str, int]]:
    """Return the history segments that hold requests: name, how a reader calls it, requests."""
    found = []
    for name, low, high in length_segments(evaluation.config.history_edges):
        sizes = [evaluation.metric(model, sampler, f"segment/{name}/n_requests") for model in evaluation.models]
        if any(sizes):
            words = f"{low:,}+" if high is None else f"{low:,}–{high - 1:,}"
            found.append((name, words, int(next(size for size in sizes if size))))
    return found


def ordered(evaluation: Evaluation, sampler: str, metric: str) -> list[str]:
    """Return the models, highest value first; those without a value last."""
    values = {name: evaluation.metric(name, sampler, metric) for name in evaluation.models}
    return sorted(values, key=lambda name: (values[name] is None, -(values[name] or 0.0)))


def _cells(evaluation: Evaluation, name: str, sampler: str, columns: Iterable[tuple[str, str]]) -> list[Cell]:
    return [
        Cell(
            number(evaluation.metric(name, sampler, metric)),
            interval(evaluation.interval(name, sampler, metric)),
            best=len(evaluation.models) > 1 and _is_best(evaluation, name, sampler, metric),
        )
        for metric, _ in columns
    ]


def _is_best(evaluation: Evaluation, name: str, sampler: str, metric: str) -> bool:
    """Whether a model has the highest value, alone or with others."""
    leader = best(evaluation, sampler, metric)
    return leader is not None and evaluation.metric(name, sampler, metric) == evaluation.metric(leader, sampler, metric)


def _header(columns: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    return ("Model", *(title for _, title in columns))


def _note(evaluation: Evaluation, sampler: str) -> str:
    note = conditions(evaluation.candidates[sampler], sampler, evaluation.split)
    some = evaluation.models[0] if evaluation.models else ""
    skipped = [
        (int(evaluation.metric(some, sampler, f"{metric}.skipped") or 0), words)
        for metric, words in (
            ("gauc", "users without both classes, in GAUC"),
            ("auc_per_request", "requests without both classes, in AUC per request"),
            ("ndcg_at_10", "requests without a positive, in the ranking metrics"),
        )
        if evaluation.metric(some, sampler, f"{metric}.skipped") is not None
    ]
    left_out = [f"{count:,} {words}" for count, words in skipped if count]
    note += f" Left out: {'; '.join(left_out)}." if left_out else " Nothing was left out."
    if evaluation.split == IMPRESSIONS and sampler == IMPRESSIONS:
        note += "".join(
            f" `{name}`: log loss {number(evaluation.metric(name, sampler, 'logloss'))}, calibration error "
            f"{number(evaluation.metric(name, sampler, 'ece'))}."
            for name in evaluation.models
        )
    elif sampler != ALL_ITEMS:
        note += " Log loss and calibration error are not defined without impressions."
    return note


def _cost_note(evaluation: Evaluation, training: Mapping[str, TrainingSummary]) -> str:
    parts = []
    trained = [one for one in training.values() if one.steps > 0]
    if trained:
        devices = ", ".join(sorted({f"`{one.device}`" for one in trained}))
        parts.append(f"Trained on {devices}; a sample is a training request or a user's sequence.")
    if evaluation.cost:
        some = next(iter(evaluation.cost.values()))
        devices = ", ".join(sorted({f"`{one.device}`" for one in evaluation.cost.values()}))
        parts.append(
            f"Scoring on {devices}. ms/request in batches: {some.candidates / some.requests:,.0f} candidates per "
            "request, the history encoded once; p50 of single requests, with one sampler's candidates. MB of weights."
        )
    return " ".join(parts)


def _split(text: str) -> tuple[str, str]:
    """Return a difference and its interval apart."""
    value, _, bounds = text.partition(" [")
    return value, bounds.removesuffix("]")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace(".", ", ").capitalize()


def _count(value: Any) -> str:
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def _quantiles(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(values.items(), key=lambda entry: (len(entry[0]), entry[0]))


def _period(first: int, last: int) -> str:
    if abs(last) < POSITIONS:
        return f"position {first:,} to {last:,}"
    return f"{_moment(first)} to {_moment(last)} (UTC)"


def _moment(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).strftime("%Y-%m-%d %H:%M")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested counts as (dotted name, number)."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
