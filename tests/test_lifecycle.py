"""Bundles under their aliases: what the watcher does with each kind of change, and who answers whom."""

import gc
import shutil
import threading
import weakref
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from serving_world import LATER, WAIT, eventually, free_port, make_service, patient_app
from starlette.testclient import TestClient
from text_world import publish_search

from ranking.manifest import read_manifest
from recsys.errors import BundleError, RecsysError, StoreError
from recsys.messages import RecommendRequest
from serving import host
from serving.lineup import BundlePlace, Lineup, Plan
from serving.pairs import Aside, read_pairs
from serving.settings import ServeConfig, load_into, load_plan, load_served
from serving.watcher import BUNDLES, MlflowRegistry, Registered, WatchConfig, Watcher, adopt, check, last_plan


def version(bundle: Path) -> str:
    return read_manifest(bundle)[1]


@dataclass
class Shelf:
    """A registry whose versions are directories; `away` makes it unreachable."""

    named: dict[str, Path] = field(default_factory=dict)
    away: bool = False
    fetched: list[str] = field(default_factory=list)

    def aliases(self):
        if self.away:
            raise ConnectionError("no route to the registry")
        return {role: Registered(version(path), str(path)) for role, path in self.named.items()}

    def fetch(self, registered: Registered, directory: Path) -> Path:
        if self.away:
            raise ConnectionError("no route to the registry")
        self.fetched.append(registered.version)
        return Path(shutil.copytree(registered.source, directory / "artifacts"))


@pytest.fixture
def shelf(place):
    return Shelf({"champion": place.bundle})


@pytest.fixture
def watcher(place, shelf, tmp_path):
    start = Plan(adopt(place.bundle, version(place.bundle), tmp_path))
    watcher = Watcher(shelf, tmp_path, start, deploy=lambda plan: deployed.append(plan))
    deployed = watcher.deployed = []
    return watcher


# --- the watcher


def test_nothing_changes_while_the_aliases_do_not(watcher, shelf):
    assert not watcher.look()
    assert watcher.deployed == []
    assert shelf.fetched == []


def test_a_new_champion_is_fetched_checked_and_deployed_once(watcher, shelf, place, tmp_path):
    shelf.named["champion"] = place.smaller
    assert watcher.look()
    assert not watcher.look()
    [plan] = watcher.deployed
    assert plan.champion.version == version(place.smaller) == version(plan.champion.directory)
    assert shelf.fetched == [version(place.smaller)]
    assert last_plan(tmp_path) == plan


def test_challenger_and_shadow_come_and_go_without_the_champion(watcher, shelf, place):
    shelf.named |= {"challenger": place.smaller, "shadow": place.smaller}
    assert watcher.look()
    assert watcher.plan.challenger == watcher.plan.shadow
    del shelf.named["challenger"], shelf.named["champion"]
    assert watcher.look()
    assert watcher.plan.challenger is None
    assert watcher.plan.shadow is not None
    assert watcher.plan.champion.version == version(place.bundle)  # somebody must answer


def test_a_bad_bundle_is_refused_once_and_the_old_one_stays(watcher, shelf, place, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(place.smaller, bad)
    golden = bad / "golden.json"
    golden.write_text(golden.read_text().replace('"at": ', '"at": 1'))
    shelf.named["champion"] = bad
    before = watcher.plan
    for _ in range(3):
        assert not watcher.look()
    assert watcher.plan == before
    assert watcher.deployed == []
    assert len(shelf.fetched) == 1
    assert [path.name for path in (tmp_path / BUNDLES).iterdir()] == [before.champion.version]


def test_an_unreachable_registry_changes_nothing_and_is_asked_again(watcher, shelf, place, caplog):
    shelf.away = True
    shelf.named["champion"] = place.smaller
    assert not watcher.look()
    assert not watcher.look()
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
    shelf.away = False
    assert watcher.look()


def test_a_service_that_does_not_take_the_plan_is_asked_again(watcher, shelf, place):
    def refuse(_):
        raise RecsysError("not ready")

    taken, watcher._deploy = watcher._deploy, refuse
    shelf.named["champion"] = place.smaller
    assert not watcher.look()
    watcher._deploy = taken
    assert watcher.look()
    assert len(shelf.fetched) == 1


def test_watching_ends_when_told(watcher, shelf, place):
    shelf.named["champion"] = place.smaller
    ended, seen = threading.Event(), threading.Event()
    watcher._deploy = lambda _: seen.set()
    thread = threading.Thread(target=watcher.watch, args=(0.01, ended))
    thread.start()
    assert seen.wait(WAIT)
    ended.set()
    thread.join(WAIT)
    assert not thread.is_alive()


def test_an_error_nobody_foresaw_does_not_end_the_watching(watcher, shelf, place):
    shelf.named["champion"] = place.smaller
    ended, seen, calls = threading.Event(), threading.Event(), []

    def deploy(_):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        seen.set()

    watcher._deploy = deploy
    thread = threading.Thread(target=watcher.watch, args=(0.01, ended))
    thread.start()
    assert seen.wait(WAIT)
    ended.set()
    thread.join(WAIT)


def test_a_bare_process_follows_the_aliases_too(place, shelf, tmp_path, monkeypatch):
    threads = []

    def run(app, **_):
        threads.extend(thread for thread in threading.enumerate() if thread.name == "watcher")
        with TestClient(app) as client:
            assert client.get("/readyz").text == f"ready {version(place.bundle)}"  # the alias, not what is published
            shelf.named |= {"champion": place.smaller, "shadow": place.bundle}
            assert eventually(lambda: client.get("/readyz").text == f"ready {version(place.smaller)}")
            assert client.get("/v1/models").json()["lineup"]["shadow"] == version(place.bundle)

    monkeypatch.setattr("uvicorn.run", run)
    monkeypatch.setattr(host, "MlflowRegistry", lambda *_: shelf)
    monkeypatch.setattr(host, "log_to", lambda *_: None)
    config = ServeConfig(place.smaller, place.snapshot, tmp_path, port=free_port(), durability="os")
    host.run_bare(replace(config, watch=WatchConfig("somewhere", seconds=0.02)))
    assert [thread.is_alive() for thread in threads] == [False]
    assert last_plan(tmp_path).champion.version == version(place.smaller)


def test_a_bare_process_without_a_registry_serves_what_is_published(place, tmp_path, monkeypatch):
    def run(app, **_):
        assert not any(thread.name == "watcher" for thread in threading.enumerate())
        with TestClient(app) as client:
            assert client.get("/readyz").text == f"ready {version(place.smaller)}"

    monkeypatch.setattr("uvicorn.run", run)
    monkeypatch.setattr(host, "log_to", lambda *_: None)
    host.run_bare(ServeConfig(place.smaller, place.snapshot, tmp_path, port=free_port(), durability="os"))


@pytest.mark.slow
def test_aliases_of_mlflow_are_followed_and_mlflow_away_changes_nothing(place, mlflow_uri, tmp_path):
    from pipelines.publish import register
    from pipelines.tracking import run

    with run(mlflow_uri, "lifecycle", experiment="lifecycle") as opened:
        pass
    register(place.bundle, opened.run_id, mlflow_uri, "lifecycle")
    register(place.smaller, opened.run_id, mlflow_uri, "lifecycle", alias="challenger")
    plan = Plan(adopt(place.bundle, version(place.bundle), tmp_path))
    deployed: list[Plan] = []
    watcher = Watcher(MlflowRegistry(mlflow_uri, "lifecycle"), tmp_path, plan, deployed.append)
    assert watcher.look()
    assert watcher.plan.champion == plan.champion
    assert watcher.plan.challenger is not None
    assert version(watcher.plan.challenger.directory) == version(place.smaller)
    away = Watcher(MlflowRegistry("http://127.0.0.1:9", "lifecycle"), tmp_path, plan, deployed.append)
    assert not away.look()
    assert len(deployed) == 1


def test_what_is_served_does_not_change_when_the_bundle_is_published_again(place, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(place.bundle, published)
    held = adopt(published, version(published), tmp_path)
    shutil.rmtree(published)
    shutil.copytree(place.smaller, published)
    assert version(held.directory) == held.version


def test_what_is_served_is_a_copy_that_is_made_again_where_it_was_damaged(place, tmp_path):
    published = tmp_path / "published"
    shutil.copytree(place.bundle, published)
    held = adopt(published, version(published), tmp_path)
    shutil.copytree(place.smaller, published, dirs_exist_ok=True)  # written into, as `cp -r other/. published` does
    assert check(held.directory) == held.version
    shutil.copytree(place.smaller, held.directory, dirs_exist_ok=True)
    with pytest.raises(BundleError):
        check(held.directory, held.version)
    assert check(adopt(place.bundle, held.version, tmp_path).directory) == held.version


# --- who answers


def test_users_stay_with_the_challenger_as_its_share_grows():
    sides = [Lineup("champion", "challenger", share=share) for share in (0.0, 0.1, 0.3, 1.0)]  # type: ignore[arg-type]
    users = [f"user-{number}" for number in range(4_000)]
    taken = [{user for user in users if side.role_of(user) == "challenger"} for side in sides]
    assert taken[0] < taken[1] < taken[2] < taken[3] == set(users)
    assert abs(len(taken[1]) / 4_000 - 0.1) < 0.02
    assert sides[3].role_of(None) == "champion"


@pytest.fixture
def two(place, tmp_path):
    """A service of two bundles, the challenger with half of the users."""
    service = make_service(place, tmp_path / "state")
    service._share = 0.5
    champion = BundlePlace(place.bundle, version(place.bundle))
    load_plan(service, Plan(champion, challenger=BundlePlace(place.smaller, version(place.smaller))))
    yield service
    service.close()


def test_each_user_is_answered_by_one_bundle_on_every_route(two, place):
    seen = Counter()
    with TestClient(patient_app(two)) as client:
        for user in [f"user-{number}" for number in range(20)]:
            body = {"user_id": user, "at": LATER}
            versions = {client.post("/v1/recommend", json=body).json()["model_version"] for _ in range(2)}
            versions.add(client.post("/v1/rank", json=body | {"item_ids": ["item-1"]}).json()["model_version"])
            seen[frozenset(versions)] += 1
        models = client.get("/v1/models").json()
    assert set(seen) == {frozenset({version(place.bundle)}), frozenset({version(place.smaller)})}
    assert models["lineup"] == {"champion": version(place.bundle), "challenger": version(place.smaller)}
    assert models["challenger_share"] == 0.5


def test_the_rival_scores_the_same_moment_beside_each_answer(two, place, tmp_path, monkeypatch):
    load_plan(two, Plan(BundlePlace(place.bundle, ""), shadow=BundlePlace(place.smaller, "")))
    asked = RecommendRequest(user_id="user-1", k=5, at=LATER)
    answer = two.recommend(asked, LATER)
    two.compare(asked, answer, LATER)
    two.compare(asked, answer.model_copy(update={"model_version": "swapped since"}), LATER)
    two.compare(asked, answer.model_copy(update={"degraded": ["rank"]}), LATER)  # no equal of a whole one
    with monkeypatch.context() as patch:
        patch.setattr(two.store, "observe", lambda _: (_ for _ in ()).throw(StoreError("away")))
        two.compare(asked, answer, LATER)
    [pair] = read_pairs(tmp_path / "state" / "pairs")
    shadow = two.lineup.shadow
    assert shadow is not None
    assert pair.answered.items == [item.item_id for item in answer.items]
    assert pair.other.items == [item.item_id for item in shadow.recommender.recommend(asked, LATER).items]
    assert (pair.at, pair.user_id, pair.answered.role, pair.other.role) == (LATER, "user-1", "champion", "shadow")


def test_a_shadow_that_fails_or_lags_harms_no_answer(two, place):
    class Broken:
        def recommend(self, request, now, budget=None):
            raise ZeroDivisionError

    two.swap(two.served, shadow=replace(two.served, recommender=Broken()))
    with TestClient(patient_app(two)) as client:
        for _ in range(5):
            assert client.post("/v1/recommend", json={"user_id": "user-1", "at": LATER}).status_code == 200
        text = client.get("/metrics").text
    assert 'recsys_shadow_requests_total{outcome="taken"}' in text


def test_work_beside_the_answers_is_dropped_beyond_its_bound():
    go, aside = threading.Event(), Aside(waiting=2)
    assert [aside.offer(go.wait) for _ in range(4)] == [True, True, False, False]
    go.set()


def test_a_refused_challenger_leaves_the_champion_and_a_refused_champion_leaves_all(two, place, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(place.smaller, bad)
    (bad / "golden.json").write_text("{}")
    before = two.lineup
    load_plan(two, Plan(BundlePlace(place.bundle, ""), challenger=BundlePlace(bad, "another")))
    assert two.lineup.challenger is before.challenger
    with pytest.raises(BundleError):
        load_plan(two, Plan(BundlePlace(bad, "another")))
    assert two.version == version(place.bundle)
    with pytest.raises(BundleError, match="expected another"):
        load_served(two, BundlePlace(place.bundle, "another"))


def test_a_bundle_that_is_replaced_is_freed_without_the_collector(place, tmp_path):
    searching = publish_search(tmp_path / "searching")
    service = make_service(place, tmp_path / "state", searching)
    service.recommend(RecommendRequest(user_id="user-1", k=5), LATER)
    before = service.served
    parts = (before, before.recommender, before.bundle, before.searcher, before.bundle.text.encoder, before.names)
    gone = [weakref.ref(part) for part in parts]
    del before, parts
    gc.disable()
    try:
        load_into(service, place.bundle)
        assert [reference() for reference in gone] == [None] * len(gone)
    finally:
        gc.enable()
    service.close()
