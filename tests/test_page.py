"""The page at `/` in a real browser over a small real service, and what it asks the service for."""

import dataclasses
import html
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from hypothesis import given
from hypothesis import strategies as st
from serving_world import PATIENT_SEARCH, USERS, WAIT, patient_app
from text_world import WordCount, publish_corpus, publish_search, snapshot

from ranking.recommender import Recommender
from serving.name_search import NameSearch, fold
from serving.page import read_page
from serving.service import Served
from serving.settings import ServeConfig, load_into, open_service

HOUR = 3_600_000_000
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")

DRIVER = """
const report = {};
const until = async ready => {
  for (let polls = 0; !ready(); polls++) {
    if (polls > 200) throw new Error(`waited in vain for ${ready}`);
    await new Promise(done => setTimeout(done, 20));
  }
};
const idle = ready => until(() => !$("main").classList.contains("stale") && ready());
const names = id => [...$(id).querySelectorAll(".name b")].map(node => node.textContent);
const press = label => document.querySelector(`button[aria-label="${label}"]`).click();
const drive = async () => {
  await idle(() => $("recommended").children.length);
  report.before = names("recommended");
  report.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const [bought] = names("days");
  const button = document.querySelector(`button[aria-label="Leave ${bought} out of the history"]`);
  button.focus();
  button.click();
  await idle(() => $("changes").children.length);
  report.bought = bought;
  report.without = [...$("changes").children].map(node => node.textContent);
  report.focus = document.activeElement.ariaLabel;
  report.gone = [...document.querySelectorAll(".gone .name b")].map(node => node.textContent);
  report.address = location.search;
  $("reset").click();
  await idle(() => !$("changes").children.length);
  report.after = names("recommended");
  $("search").value = "NUMBER 5";
  $("search").dispatchEvent(new Event("input"));
  await idle(() => $("found").children.length);
  report.found = names("found");
  press("Add Item number 59 to the history");
  await idle(() => $("changes").children.length);
  report.added = names("days")[0];
  press("Items similar to Item number 59");
  await idle(() => $("similar-list").children.length);
  report.open = $("similar").open;
  report.similar = names("similar-list");
  $("close").click();
  $("reset").click();
  await idle(() => !$("changes").children.length);
  const moment = state.history[4].timestamp;
  $("at").value = new Date(moment / 1000).toISOString().slice(0, 19);
  $("at").dispatchEvent(new Event("change"));
  await idle(() => state.at === moment && state.answer.history_events < 5);
  report.used = state.answer.history_events;
  report.shown = names("days").length;
  report.later = document.querySelectorAll("#recommended .later").length;
  $("user").value = "x".repeat(513);
  $("ask").requestSubmit();
  await until(() => !$("problem").hidden);
  report.problem = $("problem").textContent;
  report.stale = $("main").classList.contains("stale");
};
const driveSearch = async () => {
  await idle(() => $("recommended").children.length);
  report.closed = $("orders").hidden;
  const orders = () => [names("first-order"), names("placed-order")];
  const search = async text => {
    $("words").value = text;
    $("find").requestSubmit();
    await until(() => $("sought").textContent !== "Searching …");
    return orders();
  };
  report.orders = await search("red tea and bread");
  report.titles = [$("first-title").textContent, $("placed-title").textContent];
  report.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const lists = ["first-order", "placed-order"].map(id => $(id).getBoundingClientRect());
  report.beside = lists[0].right <= lists[1].left;
  report.below = lists[0].bottom <= lists[1].top;
  report.address = location.search;
  const seen = $("placed-title").textContent;
  document.querySelector("#days button").click();
  await idle(() => $("placed-title").textContent !== seen);
  report.changed = orders();
  report.left = [...state.without];
  await search(" ");
  report.blank = location.search;
  $("words").value = "";
  $("words").dispatchEvent(new Event("input"));
  report.emptied = $("orders").hidden;
};
(location.pathname === "/searched" ? driveSearch : drive)().catch(error => { report.failed = String(error); })
  .finally(() => document.body.append(make("pre", {id: "report"}, JSON.stringify(report))));
"""


@contextmanager
def served(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of an app behind uvicorn; `/driven` and `/searched` are the page with a script that uses it."""

    @app.get("/driven")
    @app.get("/searched")
    async def driven() -> HTMLResponse:
        return HTMLResponse(read_page().html.decode().replace("</body>", f"<script>{{{DRIVER}}}</script></body>"))

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(service) -> Iterator[httpx.Client]:
    with served(patient_app(service)) as client:
        yield client


@contextmanager
def searching(bundle: Path, place: Path) -> Iterator[httpx.Client]:
    """A client of a service over a bundle that searches."""
    config = ServeConfig(bundle, snapshot(place / "snapshot"), place / "state", durability="os", search=PATIENT_SEARCH)
    service = open_service(config)
    load_into(service, bundle)
    with served(patient_app(service)) as client:
        yield client
    service.close()


def look(client: httpx.Client, directory: Path, path: str = "/", width: int = 1280, **query) -> str:
    """Return the document as the browser has it once the page has settled."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        f"--disable-component-update --disable-sync --window-size={width},2000 --virtual-time-budget=20000 --dump-dom"
    )
    address = f"{client.base_url}{path}?{urlencode(query, doseq=True)}"
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={directory}", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def part(document: str, element: str, tag: str = "ol") -> str:
    found = re.search(rf'<{tag}[^>]* id="{element}"[^>]*>(.*?)</{tag}>', document, re.DOTALL)
    assert found, f"no <{tag} id={element!r}> in {document[-2000:]}"
    return found[1]


def words(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def names(markup: str) -> list[str]:
    return [html.unescape(name) for name in re.findall(r"<b>(.*?)</b>", markup)]


def events_of(client: httpx.Client, user: str) -> list[dict]:
    return client.get(f"/v1/users/{user}/history?limit=10000").json()["events"]


def recommend(client: httpx.Client, **fields) -> dict:
    return client.post("/v1/recommend", json=fields).raise_for_status().json()


def inline(events: list[dict]) -> list[dict]:
    """Return a history, newest first, as the page sends it along, oldest first."""
    return [
        {"item_id": event["item_id"] or "", "timestamp": event["timestamp"], "action": event["action"]}
        for event in reversed(events)
    ]


class Elements(HTMLParser):
    """The tags of a document, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


# --- what the page relies on


@given(
    st.lists(st.tuples(st.text("aAbBéÉß \n", max_size=6), st.integers(0, 3)), max_size=12),
    st.text("aAbBéß ", max_size=3),
    st.integers(1, 5),
)
def test_search_finds_what_reading_every_name_finds(items, query, limit):
    names = ["", "", *(name for name, _ in items)]
    ids = ["", "", *(f"a{row}" for row in range(len(items)))]
    count = np.array([9, 9, *(count for _, count in items)])
    by_count = sorted(range(2, len(names)), key=lambda row: -count[row])
    expected = [row for row in by_count if fold(query) in fold(names[row] or ids[row])]
    assert NameSearch(names, ids, count).find(query, limit) == expected[:limit]


def test_search_over_http_knows_names_in_any_case_and_ids(client):
    def found(query: str, limit: int = 100) -> list[str]:
        answer = client.get("/v1/items", params={"query": query, "limit": limit}).json()
        counts = [item["events"] for item in answer["items"]]
        assert counts[1:] == sorted(counts[1:], reverse=True)
        return [item["item_id"] for item in answer["items"]]

    assert set(found("nUMBER  5")) == {"item-5", *(f"item-{number}" for number in range(50, 60))}
    assert found("item-61") == ["item-61"]
    assert len(found("")) == 62
    assert found("item number", 3) == found("")[:3]
    assert found("no such name") == []


def test_a_history_sent_along_unchanged_is_answered_like_the_stored_one(client):
    posted = [{"user_id": "user-2", "item_id": item, "timestamp": 2**50} for item in ("item-1", "not known", "item-2")]
    client.post("/v1/events", json={"events": posted}).raise_for_status()
    for user in [f"user-{number}" for number in range(USERS)]:
        events = events_of(client, user)
        for at in (events[0]["timestamp"] + HOUR, events[len(events) // 2]["timestamp"]):
            stored = recommend(client, user_id=user, k=20, at=at)
            sent = recommend(client, history=inline(events), k=20, at=at)
            assert sent | {"timings": 0} == stored | {"timings": 0}


def test_the_page_asks_nobody_else(client):
    response = client.get("/")
    assert set(re.findall(r"https?://[^'\"\s]*", response.text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(?:src|href)=\"(?!data:|docs|openapi|v1/|metrics)|@import|url\(", response.text)
    assert "default-src 'none'" in response.headers["content-security-policy"]


# --- the page in a browser


@browser
def test_the_page_shows_what_the_service_answers(client, service, tmp_path):
    document = look(client, tmp_path)  # no user named: the first one known
    user = client.get("/v1/users?limit=1").json()["users"][0]
    events = events_of(client, user)
    at = (events[0]["timestamp"] + HOUR) // 1_000_000 * 1_000_000
    answer = recommend(client, user_id=user, at=at)
    shown = part(document, "recommended")
    assert names(shown) == [item["name"] for item in answer["items"]]
    assert all(f"{item['score']:.3f}" in shown for item in answer["items"])
    assert {source for item in answer["items"] for source in item["sources"]} <= set(re.findall(r"[a-z]+", shown))
    assert f"User {user}: {len(events)} events used" in words(part(document, "said", "p"))
    history = names(part(document, "days"))
    assert history == [event["name"] or "an item the bundle does not know" for event in events][: len(history)]
    assert len(history) == min(len(events), 40)
    assert "proposing candidates" in part(document, "stages", "dl")
    assert service.version in part(document, "bundle", "p")


@browser
def test_what_if_shows_the_answer_to_the_changed_history(client, tmp_path):
    user = "user-7"
    events = events_of(client, user)
    at = events[0]["timestamp"] + HOUR
    left_out = events[1]["item_id"]
    kept = inline([event for event in events if event["item_id"] != left_out])
    added = {"item_id": "item-33", "timestamp": at - 1, "action": kept[-1]["action"]}
    expected = recommend(client, history=[*kept, added], k=15, at=at)
    before = [item["name"] for item in recommend(client, user_id=user, k=15, at=at)["items"]]
    document = look(client, tmp_path, user=user, k=15, without=left_out, **{"with": "item-33"})
    after = names(part(document, "recommended"))
    assert after == [item["name"] for item in expected["items"]]
    assert after != before
    new = len(set(after) - set(before))
    assert part(document, "recommended").count('title="new in the list"') == new
    assert all(name in words(part(document, "left", "p")) for name in set(before) - set(after))
    assert "Item number 33" in words(part(document, "changes", "ul"))


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_changes_searches_and_goes_back_in_time(client, tmp_path, width):
    document = look(client, tmp_path, "/driven", width, user="user-5")
    report = json.loads(words(part(document, "report", "pre")))
    assert "failed" not in report, report
    assert report["overflow"] <= 0
    bought = report["bought"]
    assert report["without"][0].startswith(f"without {bought} (")
    assert report["focus"] == f"Put {bought} back"
    assert set(report["gone"]) == {bought}
    assert f"without=item-{bought.removeprefix('Item number ')}" in report["address"]
    assert report["after"] == report["before"]
    assert set(report["found"]) == {"Item number 5", *(f"Item number {number}" for number in range(50, 60))}
    assert report["added"] == "Item number 59"
    similar = client.get("/v1/items/item-59/similar?k=12").json()["items"]
    assert report["open"]
    assert report["similar"] == [item["name"] for item in similar]
    assert report["used"] == report["shown"] == 4
    assert "at most 512 characters" in report["problem"]
    assert report["stale"]
    later = {event["name"] for event in events_of(client, "user-5")[:-4]}
    at = events_of(client, "user-5")[-5]["timestamp"]
    answer = recommend(client, user_id="user-5", at=at)
    assert report["later"] == sum(item["name"] in later for item in answer["items"])


@browser
def test_names_and_ids_are_never_markup(client, service, tmp_path):
    hostile = "<img src=x onerror=\"document.title='hit'\"></b><script>document.title='hit'</script>"
    before = service.served
    bundle = dataclasses.replace(before.bundle, names=["", ""] + [f"{hostile} {n}" for n in range(62)])
    client.post("/v1/events", json={"events": [{"user_id": hostile, "item_id": "item-1"}]}).raise_for_status()
    service.swap(Served(bundle, Recommender(bundle, service.store)))
    try:
        document = look(client, tmp_path, user=hostile, **{"with": hostile})
    finally:
        service.swap(before)
    assert "<title>recsys</title>" in document
    assert hostile in words(part(document, "said", "p"))
    assert names(part(document, "days"))[-1].startswith(hostile.split(", ")[0])
    found = Elements()
    found.feed(document)
    assert "img" not in found.tags
    assert found.tags.count("script") == 1


@browser
def test_refusals_and_strangers_are_told_in_words(client, tmp_path):
    refused = look(client, tmp_path / "refused", user="x" * 513)
    told = words(part(refused, "problem", "div"))
    assert "at most 512 characters" in told
    assert not re.search(r'<div[^>]* id="problem"[^>]* hidden', refused)
    stranger = look(client, tmp_path / "stranger", user="nobody / knows?")
    assert "Nothing is known of user nobody / knows?" in words(part(stranger, "said", "p"))
    popular = recommend(client, user_id="nobody / knows?")["items"]
    assert names(part(stranger, "recommended")) == [item["name"] for item in popular]


# --- the search box


@browser
def test_both_orders_of_a_search_are_shown_side_by_side(tmp_path):
    def texts(**fields) -> list[str]:
        answer = client.post("/v1/search", json={"query": "red tea and bread", "budget_ms": 60_000, **fields})
        return [hit["text"] for hit in answer.raise_for_status().json()["hits"]]

    user = "user-3"
    with searching(publish_search(tmp_path / "bundle", reranker=WordCount()), tmp_path) as client:
        events = events_of(client, user)
        at = (events[0]["timestamp"] + HOUR) // 1_000_000 * 1_000_000
        for width in (1280, 390):
            document = look(client, tmp_path / str(width), "/searched", width, user=user)
            report = json.loads(words(part(document, "report", "pre")))
            assert "failed" not in report, report
            assert report["closed"]
            assert report["orders"] == [texts(rerank=False), texts(user_id=user, at=at)]
            assert report["titles"] == ["First stage: by words and vectors", f"Reranked and blended for user {user}"]
            assert report["overflow"] <= 0
            assert (report["beside"], report["below"]) == ((True, False) if width > 1000 else (False, True))
            assert "words=red+tea" in report["address"]
            kept = inline([event for event in events if event["item_id"] not in report["left"]])
            assert report["changed"] == [report["orders"][0], texts(history=kept, at=at)]
            assert report["changed"] != report["orders"]
            assert report["emptied"]
            assert report["blank"].count("words=red+tea")  # a blank text is not asked for
        shown = look(client, tmp_path / "address", user=user, words="red tea and bread")  # the address alone is enough
        assert names(part(shown, "first-order")) == report["orders"][0]


@browser
def test_a_bundle_of_text_alone_is_searched_and_one_without_text_says_so(client, tmp_path):
    with searching(
        publish_corpus(tmp_path / "bundle", ["red tea\nmild, from the hills", "green bread", "red soap"]), tmp_path
    ) as corpus:
        document = look(corpus, tmp_path / "corpus", words="red")
        assert sorted(names(part(document, "first-order"))) == ["red soap", "red tea"]
        assert "mild, from the hills" in words(part(document, "first-order"))
        assert re.search(r'<section[^>]* id="placed"[^>]* hidden', document)
        assert re.search(r'<form[^>]* id="ask"[^>]* hidden', document)
        assert re.search(r'<div[^>]* id="problem"[^>]* hidden', document)
    without = look(client, tmp_path / "without")
    assert re.search(r'<form[^>]* id="find"[^>]* hidden', without)
    assert not re.search(r'<p[^>]* id="no-text"[^>]* hidden', without)
    assert "searches no text" in words(part(without, "no-text", "p"))
