"""What the report says of attention: distances from the exact one by history length, and examples by item name."""

from dataclasses import replace

from pipelines.attention_record import AttentionFound, Distance, Looked
from pipelines.evaluation import Evaluation, length_segments
from pipelines.findings import interval, number, percent
from pipelines.tables import Cell, Table
from recsys.bootstrap import Value


def distances(evaluation: Evaluation) -> list[Table]:
    """Return a table per distance: models by history length; none where no model approximates."""
    found = evaluation.attention
    if found is None or not found.distances:
        return []
    where = f"{found.requests:,} `{evaluation.split}` requests, up to eight candidates each. "
    what = "Exact attention is over all events of the model's window"
    meaning = "for models that hash, by the chance of a collision, which their hashes estimate."
    lies = _table(evaluation, found, "Attention that lies elsewhere", "elsewhere")
    turned = _table(evaluation, found, "How far what is read is turned", "turned")
    return [
        _with_note(lies, f"{where}Share of the exact attention that is on other events: 0 is exact. {what}; {meaning}"),
        _with_note(turned, "1 − cosine between what a model reads of the history and what exact attention would read."),
    ]


def examples(evaluation: Evaluation) -> list[Table]:
    """Return a table per example: each model's rank of what was taken, and the items it looked at most."""
    found = evaluation.attention
    tables = []
    for one in found.examples if found is not None else ():
        most = max((len(view.looked) for view in one.views), default=0)
        rows = []
        for view in one.views:
            cells = [Cell(looked.item, _where(looked)) for looked in view.looked]
            cells += [Cell("–")] * (most - len(cells))
            rows.append((Cell(view.model), Cell(f"{view.rank:,}"), *cells))
        header = ("Model", f"Rank of {one.candidates:,}", *("looks at", "then at", "then at")[:most])
        tables.append(Table(f"{one.item}, after {one.events:,} events", header, tuple(rows), words=True))
    if tables:
        note = (
            "An item that was taken, its rank among the request's candidates, and the items of the history with the "
            "largest share of that candidate's attention: over how many of its events, and how many days (or events) "
            "before the request the newest of them was."
        )
        tables[-1] = _with_note(tables[-1], note)
    return tables


def _table(evaluation: Evaluation, found: AttentionFound, title: str, distance: str) -> Table:
    words = {
        name: f"{low:,}+" if high is None else f"{low:,}–{high - 1:,}"
        for name, low, high in length_segments(evaluation.config.history_edges)
    }
    known = {(one.model, one.segment): one for one in found.distances}
    segments = [name for name in words if any(segment == name for _, segment in known)]
    models = list(dict.fromkeys(one.model for one in found.distances))
    rows = [(Cell(model), *(_cell(known.get((model, segment)), distance) for segment in segments)) for model in models]
    sizes = {segment: max(one.requests for one in found.distances if one.segment == segment) for segment in segments}
    rows.append((Cell("requests"), *(Cell(f"{sizes[segment]:,}") for segment in segments)))
    return Table(title, ("Model", *(words[segment] for segment in segments)), tuple(rows))


def _cell(found: Distance | None, distance: str) -> Cell:
    if found is None:
        return Cell("–")
    value: Value = getattr(found, distance)
    bounds = None if value[1] is None or value[2] is None else (value[1], value[2])
    return Cell(number(value[0]), interval(bounds))


def _where(looked: Looked) -> str:
    """Say how much attention an item has, in how many events, and how long ago the newest was, short for a phone."""
    when = f"{looked.back:,} back" if looked.days is None else f"{looked.days:,.0f} d"
    return f"{percent(looked.share)}, {looked.events:,}×, {when}"


def _with_note(table: Table, note: str) -> Table:
    return replace(table, note=note)
