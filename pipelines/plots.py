"""The report's plots as inline SVG: small, the same bytes every time, and at home on light, dark and paper.

Text and axes take the colour of the page (`currentColor`); series have fixed mid-tone colours that are told apart by
people who do not see red and green, and different markers besides.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK = "#010203"  # replaced by currentColor
COLOURS = ("#0a84c6", "#d9730d", "#17966b", "#b5569c", "#c29a00", "#7a6ff0", "#8a8f98", "#c8443d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 4.2  # inches; 400 px, so that type keeps its size on a phone
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Point:
    """A value and its interval; either may be missing."""

    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """One line or one row of marks: a name and a point per category (or per x)."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Curve:
    """A line by x; `place` is its model's among all models, so that it has the same colour in every plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    place: int


@dataclass(frozen=True)
class Reliable:
    """A reliability curve: by bin, the mean probability and the share that happened."""

    name: str
    probability: Sequence[float]
    share: Sequence[Point]


def ranges(title: str, label: str, categories: Sequence[str], series: Sequence[Series], zero: bool = False) -> str:
    """Return horizontal marks with intervals: one row per category (best first), one mark per series in it.

    `zero` draws a line at 0, where differences are shown.
    """

    def paint(axes: "Axes") -> None:
        if zero:
            axes.axvline(0, color=INK, linewidth=0.8)
        for index, one in enumerate(series):
            for row, point in enumerate(one.points):
                if point.value is not None:
                    place, name = row + _shift(index, len(series)), one.name if row == 0 else None
                    axes.errorbar(point.value, place, xerr=_arms([point]), **_mark(index), label=name)
        axes.set_yticks(range(len(categories)), categories)
        axes.set_ylim(len(categories) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        _legend(axes, len(series))

    return _draw(title, 0.9 + 0.34 * len(categories), paint)


def lines(title: str, x_label: str, y_label: str, categories: Sequence[str], series: Sequence[Series]) -> str:
    """Return one line per series over ordered categories, with intervals, far enough apart to be told apart."""

    def paint(axes: "Axes") -> None:
        for index, one in enumerate(series):
            known = [(place, point) for place, point in enumerate(one.points) if point.value is not None]
            x = [place + _shift(index, len(series)) for place, _ in known]
            y = [point.value or 0.0 for _, point in known]
            arms = _arms([point for _, point in known])
            axes.errorbar(x, y, yerr=arms, **_mark(index, line=True), label=one.name)
        axes.set_xticks(range(len(categories)), categories)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        _legend(axes, len(series))

    return _draw(title, 3.2, paint)


def scatter(
    title: str, x_label: str, y_label: str, names: Sequence[str], x: Sequence[float], y: Sequence[Point]
) -> str:
    """Return one named mark per model over a logarithmic axis, e.g. quality against milliseconds."""

    def paint(axes: "Axes") -> None:
        for index, (place, point) in enumerate(zip(x, y, strict=True)):
            axes.errorbar(place, point.value or 0.0, yerr=_arms([point]), **_mark(index), label=names[index])
        axes.set_xscale("log")
        _few_plain_ticks(axes, x)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        _legend(axes, len(names))

    return _draw(title, 3.2, paint)


def curves(title: str, x_label: str, y_label: str, found: Sequence[Curve]) -> str:
    """Return one line per curve."""

    def paint(axes: "Axes") -> None:
        for one in found:
            axes.errorbar(one.x, one.y, **_mark(one.place, line=True), label=one.name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        _legend(axes, len(found))

    return _draw(title, 2.8, paint)


def reliability(title: str, x_label: str, y_label: str, found: Sequence[Reliable]) -> str:
    """Return shares against probabilities, with the line on which both are equal."""
    ends = [end for one in found for point in one.share for end in (point.interval or ())]
    values = [*(x for one in found for x in one.probability), *(p.value or 0.0 for one in found for p in one.share)]
    top = 1.05 * max([*values, *ends], default=1.0)

    def paint(axes: "Axes") -> None:
        axes.plot([0, top], [0, top], color=INK, linewidth=0.6, alpha=0.5)
        for index, one in enumerate(found):
            y = [point.value or 0.0 for point in one.share]
            arms = _arms(one.share)
            axes.errorbar(one.probability, y, yerr=arms, **_mark(index, line=True), label=one.name)
        axes.set_xlim(0, top)
        axes.set_ylim(0, top)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        _legend(axes, len(found))

    return _draw(title, 3.6, paint)


def _draw(title: str, height: float, paint: Callable[["Axes"], None]) -> str:
    # The object interface, not pyplot: no window system is looked for and nothing is shared.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        return _inline(figure, title)


def _inline(figure: Any, title: str) -> str:
    """Return the figure as an <svg> element with a title, page fonts and page colours."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = text.replace(INK, "currentColor")
    # Ids are only unique within a figure; the page holds several.
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    head, rest = text.split(">", 1)
    return f'{head} role="img">\n<title>{title}</title>{rest}'.strip()


def _few_plain_ticks(axes: "Axes", values: Sequence[float]) -> None:
    """Put about four round numbers on a logarithmic axis, written as a person would: 0.5, 2, 10."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values) / 1.25, max(values) * 1.25
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)):
        places = [digit * 10.0**decade for decade in decades for digit in digits]
        places = [place for place in places if low <= place <= high]
        if len(places) >= 3:
            break
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _arms(points: Sequence[Point]) -> list[list[float]]:
    """Return the distances from values to the ends of their intervals, [2, points], as matplotlib wants them."""
    ends = [(p.value or 0.0, *(p.interval or (p.value or 0.0, p.value or 0.0))) for p in points]
    return [[max(value - low, 0.0) for value, low, _ in ends], [max(high - value, 0.0) for value, _, high in ends]]


def _shift(index: int, total: int) -> float:
    """Return how far a series stands beside its place, so that intervals do not cover each other."""
    return (index - (total - 1) / 2) * 0.5 / max(total, 1)


def _mark(index: int, line: bool = False) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    return {
        "color": colour,
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.2 if line else 0,
        "elinewidth": 1.1,
        "capsize": 0,
    }


def _legend(axes: "Axes", entries: int) -> None:
    if entries > 1:
        axes.figure.legend(loc="outside lower center", ncols=min(entries, 3), fontsize=8.5, handlelength=1.2)
