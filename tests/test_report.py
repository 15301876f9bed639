"""The report: sentences say what the numbers say, the page needs nothing beside it, tables are whole."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from evaluations import comparison, evaluation
from hypothesis import given
from hypothesis import strategies as st

from pipelines import plots
from pipelines.audit_record import Audit, Check, SamplerFacts, SplitFacts
from pipelines.evaluation import (
    TrainingSummary,
)
from pipelines.findings import against, caution, percent, points, signed, verdict
from pipelines.report import build_page, render_html, render_markdown, write_report

MANIFEST = {
    "source": {"name": "a <small> log", "digest": "d"},
    "counts": {"users": 1234, "requests": {"train": 5000}, "repeats": 0.409},
    "time": {"first": 1483228800000000, "last": 1514764800000000},
    "cuts": {"valid": 1511000000000000, "test": 1512300000000000},
    "config": {"split": {"kind": "time"}},
    "history_length": {"p10": 5, "p50": 40, "p100": 9999},
    "digest": "0123456789abcdef0123",
}


TRAINING = {
    "dare": TrainingSummary(
        "dare", 61.5, 900, 750, 4213.4, 33.2, 1_876_543, 3 * 2**30, "cpu", {"model": {"width": 16}, "seed": 2023},
        [{"step": 150, "valid/gauc": 0.8}, {"step": 300, "valid/gauc": 0.85}],
    ),
    "popularity": TrainingSummary("popularity", 0, 0, 0, 0, 0, 0),
}  # fmt: skip


# -- words ------------------------------------------------------------------------------------------------------------


@given(st.floats(-0.5, 0.5), st.floats(0.0, 0.5), st.floats(0.0, 0.5), st.booleans())
def test_a_model_beats_another_only_where_the_interval_leaves_out_zero(difference, below, above, turned):
    low, high = difference - below, difference + above
    stored = comparison("dare", "din", difference, low, high)
    if turned:  # the same fact, stored the other way round
        stored = replace(
            stored, model="din", other="dare", difference=-difference, ci_low=-high, ci_high=-low,
            share_better=1 - stored.share_better,
        )  # fmt: skip
    text = against(replace(evaluation(), comparisons=[stored]), "uniform", "gauc", "dare", "din")
    assert ("beats" in text) == (low > 0)
    assert ("loses to" in text) == (high < 0)
    assert ("No difference" in text) == (low <= 0 <= high)


def test_the_verdict_is_one_sentence_and_the_points_behind_it_are_few():
    assert verdict(evaluation()) == (
        "`dare` has the highest GAUC, 0.9000 [0.8900 to 0.9100], and beats `popularity` and `personal_frequency`."
    )
    measured, popular, outside, full = points(evaluation())
    assert "on 2,000 `test` requests of 1,500 users, against 100 `uniform` negatives each" in measured
    assert "`dare` beats `personal_frequency` by 0.1000 [0.0900 to 0.1100], ahead in every one of 1,000" in measured
    assert popular == "Against `popularity` negatives `dare` is again highest, 0.9000 [0.8900 to 0.9100]."
    assert "Outside the history" in outside
    assert "Ranking all 110 items for 2,000 of these requests" in full
    assert "95 % intervals over resampled users" in caution(evaluation())
    many = evaluation({f"m{place}": 0.5 + place / 50 for place in range(12)})
    assert len(points(many)) <= 4
    assert verdict(many).endswith("and beats `m0`, `m1`, `m2` and 8 others.")
    assert all(len(text) < 320 for text in (verdict(many), *points(many)))


def test_the_words_are_as_plain_where_the_news_is_bad():
    floor = verdict(evaluation({"personal_frequency": 0.9, "dare": 0.895, "din": 0.7}))
    assert "cannot be told from `dare`; it beats `din`; it learns nothing from a loss, and no trained model" in floor
    near = points(evaluation({"popularity": 0.7, "personal_frequency": 0.895, "dare": 0.9}))[0]
    assert "No difference from `personal_frequency` was found: +0.0050 [−0.0050 to +0.0150]" in near
    unsure = evaluation(width=0)
    assert "but no interval was computed: how sure that is is not known" in verdict(unsure)
    assert "differs from `personal_frequency` by +0.1000; no interval was computed" in points(unsure)[0]
    assert "resampled" not in caution(unsure)
    assert verdict(evaluation({"popularity": 0.7})).endswith("it was evaluated alone.")
    assert verdict(evaluation({})) == "No model was evaluated."


@pytest.mark.parametrize("times", [(0.3, 0.9), (0.05, 40.0), (8.1, 8.2, 9.0), (1.0, 1.0)])
def test_the_axis_of_milliseconds_has_a_few_plain_numbers(times):
    names = [f"m{place}" for place in range(len(times))]
    svg = plots.scatter("latency", "milliseconds", "GAUC", names, times, [plots.Point(0.5)] * len(times))
    assert "$" not in svg
    below = svg[svg.index('id="latency-matplotlib.axis_1"') : svg.index('id="latency-matplotlib.axis_2"')]
    shown = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", below)]
    assert shown.pop() == "milliseconds"
    assert 1 <= len(shown) <= 6
    assert all(min(times) / 1.3 < float(text) < max(times) * 1.3 for text in shown)


def test_numbers_in_words():
    assert [signed(x) for x in (0.01234, -0.5, 0.00001, -0.00001)] == ["+0.0123", "−0.5000", "0.0000", "0.0000"]
    assert [percent(x) for x in (0, 1, 0.4071, 0.0004, 0.00001, 0.9996, 0.99999)] == [
        "0.0 %", "100.0 %", "40.7 %", "0.04 %", "under 0.01 %", "99.96 %", "over 99.99 %",
    ]  # fmt: skip


# -- the page ---------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Collects what a browser would load, ids, text, and whether every element is closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.tags, self.loaded, self.ids, self.open, self.text = set(), [], [], [], []

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_starttag(self, tag, attributes, closed=False):
        self.tags.add(tag)
        if not closed and tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.loaded.append(value)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(html):
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


@pytest.mark.parametrize(
    ("found", "training", "manifest"),
    [
        (evaluation(), TRAINING, MANIFEST),
        (evaluation({"popularity": 0.7}, width=0, full=False), {}, {}),
        (evaluation({"<b>evil</b> & co": 0.5, "dare": 0.5}), TRAINING, MANIFEST),
    ],
)
def test_the_page_stands_alone(found, training, manifest):
    html = render_html(build_page(found, training, manifest))
    page = read(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "b"}
    assert all(target.startswith("#") for target in page.loaded)
    assert "@import" not in html
    assert "url(http" not in html
    assert len(page.ids) == len(set(page.ids))
    references = {target[1:] for target in page.loaded} | set(re.findall(r"url\(#([^)]+)\)", html))
    assert references <= set(page.ids)
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) >= 4
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    for model in found.models:
        assert model in "".join(page.text)


def test_every_number_of_the_evaluation_is_on_the_page():
    found = evaluation({"popularity": 0.71234, "personal_frequency": 0.81234, "dare": 0.91234})
    page = build_page(found, TRAINING, MANIFEST)
    texts = {"html": "".join(read(render_html(page)).text), "markdown": render_markdown(page)}
    for text in texts.values():
        for words in (
            "0.9123", "0.9023–0.9223", "−0.2000", "100 negatives and 10.0 positives per request",
            "41.0 % of the positives", "0.5 % of the negatives", "3 users without both classes", "1,876,543", "4,213",
            "1,234", "5,000", "3,072", "2017-01-01 00:00 to 2018-01-01 00:00", "global time", "p100 9,999", "0.409",
            "not defined",
        ):  # fmt: skip
            assert words in text
    assert "model.width" in texts["html"]


def test_positions_are_said_as_such_and_not_as_moments_of_1970():
    told = render_markdown(build_page(evaluation(), TRAINING, MANIFEST | {"time": {"first": 0, "last": 1234}}))
    assert "position 0 to 1,234 |" in told
    assert "1970" not in told


def test_the_verdict_of_the_audit_stands_first():
    checks = (Check("counts", False, "3 of 7 | all", "none"), Check("cuts", True, "two", "two"))
    facts = (SplitFacts("test", 100, 90, 800, 0.5, 100, 1, 2, 34, 5),)
    samplers = (SamplerFacts("test", "uniform", 100, 20.0, None, 0.61, 0.62, 0.71, None),)
    audit = Audit("d", checks, facts, samplers, 0.4)
    for changed, words in (
        (audit, "The audit of this data failed 1 of 2 checks: counts."),
        (replace(audit, checks=checks[1:]), "The audit of this data passed: 1 check, no leak found."),
        (replace(audit, data_digest="another"), "The last audit was of other data than this report"),
    ):
        page = build_page(evaluation(), TRAINING, MANIFEST, changed)
        html, markdown = "".join(read(render_html(page)).text), render_markdown(page).replace("`", "")
        for text in (html, markdown):
            assert text.index(words) < text.index("has the highest GAUC")
            shown = changed.data_digest == "d"
            assert ("What models that learn nothing reach" in text) == shown
            assert ("0.6100" in text) == shown
            assert ("3 of 7" in text) == (changed is audit)
    assert "audit" not in "".join(read(render_html(build_page(evaluation(), TRAINING, MANIFEST))).text).lower()


def test_markdown_tables_are_rectangles():
    text = render_markdown(build_page(evaluation({"a|b": 0.5, "dare": 0.6}), TRAINING, MANIFEST))
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) >= 8
    for block in blocks:
        columns = {len(re.split(r"(?<!\\)\|", line)) for line in block}
        assert len(columns) == 1


def test_the_best_of_a_column_is_bold_ties_included():
    tied = build_page(evaluation({"a": 0.9, "b": 0.9, "c": 0.8}), {}, {}).quality[0]
    assert [row[1].best for row in tied.rows] == [True, True, False]


def test_files_are_written_and_the_same_every_time(tmp_path):
    for folder in ("one", "two"):
        write_report(evaluation(), TRAINING, MANIFEST, tmp_path / folder)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {"report.html", "report.md"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
