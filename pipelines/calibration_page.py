"""What the report says of probabilities: a table, reliability plots, and why there are none on sampled candidates."""

from pipelines import plots
from pipelines.calibration import Reading
from pipelines.evaluation import Evaluation
from pipelines.findings import PRIMARY, interval, number
from pipelines.plots import Point, Reliable
from pipelines.prepared import IMPRESSIONS
from pipelines.tables import Cell, Table, ordered
from recsys.bootstrap import Value

MOST_PLOTS = 4
"""Models drawn, best GAUC first; the table has all."""
MAPS: dict[str, str] = {"none": "as it is", "isotonic": "isotonic", "platt": "platt"}


def why_not(evaluation: Evaluation) -> str:
    """Say why calibration is not defined; nothing where it is."""
    if evaluation.reliability:
        return ""
    return (
        "Not defined: negatives were drawn, not shown, so how often an item is taken when it is shown cannot be known "
        "from them. On a log with impressions, `recsys evaluate --config evaluate_impressions` measures it."
    )


def table(evaluation: Evaluation) -> Table:
    """Return calibration error and log loss of every model: of scores as logits, and by each map."""
    rows = []
    for name in ordered(evaluation, IMPRESSIONS, PRIMARY):
        readings = evaluation.reliability[name].readings
        cells = [_cell(readings.get(one), measure, readings) for measure in ("ece", "logloss") for one in MAPS]
        rows.append((Cell(name), *cells))
    header = tuple(f"{words}, {how}" for words in ("Error", "Log loss") for how in MAPS.values())
    return Table("Calibration", ("Model", *header), tuple(rows), _note(evaluation))


def figures(evaluation: Evaluation) -> dict[str, tuple[str, str]]:
    """Return a reliability plot per model: its name, and what it shows with the SVG."""
    found = {}
    for name in ordered(evaluation, IMPRESSIONS, PRIMARY)[:MOST_PLOTS]:
        readings = evaluation.reliability[name].readings
        curves = [
            Reliable(
                MAPS[how],
                [one.probability for one in reading.bins],
                [Point(one.rate, _bounds((one.rate, one.ci_low, one.ci_high))) for one in reading.bins],
            )
            for how, reading in readings.items()
        ]
        svg = plots.reliability(f"reliability {name}", "probability", "share taken", curves)
        caption = f"{name}: what was said and what was taken, tenths of what was shown. On the line, both are the same."
        found[name] = (caption, svg)
    return found


def _cell(reading: Reading | None, measure: str, readings: dict[str, Reading]) -> Cell:
    if reading is None:
        return Cell("–")
    value: Value = getattr(reading, measure)
    known = [one[0] for one in (getattr(other, measure) for other in readings.values()) if one[0] is not None]
    return Cell(number(value[0]), interval(_bounds(value)), best=len(known) > 1 and value[0] == min(known))


def _bounds(value: Value) -> tuple[float, float] | None:
    return None if value[1] is None or value[2] is None else (value[1], value[2])


def _note(evaluation: Evaluation) -> str:
    note = (
        "Error: mean distance between probability and the share taken, over 15 bins of equal size. `as it is` reads a "
        "score as a logit. "
    )
    fitted = {one.answers for one in evaluation.reliability.values() if one.answers}
    if fitted:
        note += (
            f"The maps were fitted on {max(fitted):,} answers of the validation period and are judged on the test "
            "period; `recsys publish --calibration` puts one into the bundle. "
        )
    whys = [f"`{name}`: {one.why}." for name, one in evaluation.reliability.items() if one.why]
    return (note + (f"Missing maps: {' '.join(dict.fromkeys(whys))}" if whys else "")).strip()
