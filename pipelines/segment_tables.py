"""The report's tables and sentences on segments: for whom a model is better than the champion."""

from itertools import groupby

from pipelines.evaluation import Evaluation, SegmentFacts
from pipelines.findings import PRIMARY, best, interval, number, signed
from pipelines.tables import Cell, Table


def champion_of(evaluation: Evaluation) -> str | None:
    """Return the model that others are held against: the one named, else that of the highest GAUC."""
    return evaluation.config.champion or best(evaluation, evaluation.config.samplers[0], PRIMARY)


def segments(evaluation: Evaluation) -> list[Table]:
    """Return one table per kind of segment: its size, the champion's GAUC, every other model's difference from it."""
    champion = champion_of(evaluation)
    if champion is None:
        return []
    others = [name for name in evaluation.models if name != champion]
    header = ("Segment", "Requests", "Users", "Positives", champion, *others)
    found = []
    for kind, part in groupby(evaluation.segments, lambda segment: segment.kind):
        rows = tuple(_row(evaluation, segment, champion, others) for segment in part)
        note = f"GAUC of `{champion}`, and the difference of the others from it, with intervals. Exploratory."
        found.append(Table(kind.capitalize(), header, rows, note))
    return found


def sentence(evaluation: Evaluation) -> str:
    """Say for whom another model is better than the champion, and what is not defined; nothing without segments."""
    champion, sampler = champion_of(evaluation), evaluation.config.samplers[0]
    if champion is None or not evaluation.segments:
        return ""
    better = []
    for segment in evaluation.segments:
        for name in evaluation.models:
            found = evaluation.compare(sampler, f"segment/{segment.name}/{PRIMARY}", name, champion)
            if name != champion and found is not None and found.certain and found.difference > 0:
                better.append(f"`{name}` for {segment.kind} {segment.words} ({signed(found.difference)})")
    empty = sum(not segment.positives for segment in evaluation.segments)
    text = f"Of {len(evaluation.segments)} segments looked at, "
    if better:
        few = f": {'; '.join(better)}" if len(better) <= 2 else f", e.g. {'; '.join(better[:2])}"
        text += f"a model better than `{champion}` was found {_times(len(better))}{few}"
    else:
        text += f"no model was found better than `{champion}` in any"
    if empty:
        text += f"; {empty} had no positive and define nothing"
    return f"{text}. These are leads, not verdicts: with many looks some differ by chance."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _row(evaluation: Evaluation, segment: SegmentFacts, champion: str, others: list[str]) -> tuple[Cell, ...]:
    sampler, metric = evaluation.config.samplers[0], f"segment/{segment.name}/{PRIMARY}"
    cells = [Cell(segment.words), *(Cell(f"{size:,}") for size in (segment.requests, segment.users, segment.positives))]
    ours = evaluation.metric(champion, sampler, metric)
    cells.append(
        Cell("not defined" if ours is None else number(ours), interval(evaluation.interval(champion, sampler, metric)))
    )
    for name in others:
        found = evaluation.compare(sampler, metric, name, champion)
        if found is None:
            cells.append(Cell("–"))
            continue
        low, high = found.ci_low, found.ci_high
        bounds = "" if low is None or high is None else f"{signed(low)} to {signed(high)}"
        cells.append(Cell(signed(found.difference), bounds, best=found.certain))
    return tuple(cells)
