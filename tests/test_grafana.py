"""The dashboard that is shipped asks for metrics and labels that a scrape has."""

import json
import re
from importlib import resources

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serving.telemetry import Telemetry

DASHBOARD = json.loads(resources.files("serving").joinpath("static/grafana.json").read_text())
QUERIES = {
    f"{panel['title']}/{target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of each sample in a scrape after everything has been counted once."""
    telemetry = Telemetry()
    telemetry.request("/v1/recommend", "POST", 200, 0.01, 100)
    telemetry.stages({"score": 0.001})
    telemetry.answer(user_known=False, degraded=["rerank"])
    telemetry.candidates(10, 1)
    telemetry.verdict("accepted")
    telemetry.forget()
    telemetry.swap()
    telemetry.refused()
    telemetry.shadow("taken")
    telemetry.recommended(10, 9, 200)
    telemetry.effect(0.001)
    telemetry.parity(0.0)
    telemetry.created(1.0)
    telemetry.drift(0.1)
    telemetry.recall(0.99)
    families = text_string_to_metric_families(telemetry.scrape().decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_asks_for_what_a_scrape_has(labels, query):
    expression = QUERIES[query]
    asked = re.findall(r"\brecsys_\w+", expression)
    assert asked
    assert set(asked) <= set(labels)
    selected = set(re.findall(r"(\w+)=~?\"", expression))
    grouped = {name for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(", ")}
    for metric in asked:
        assert selected | grouped <= labels[metric], metric


def test_the_dashboard_shows_every_metric(labels):
    shown = {name for expression in QUERIES.values() for name in re.findall(r"\brecsys_\w+", expression)}

    def stem(name: str) -> str:
        return re.sub(r"_(bucket|count|sum|total|created)$", "", name)

    assert {stem(name) for name in labels} == {stem(name) for name in shown}


def test_panels_do_not_overlap():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
