"""The loop: what users do with what is served is learned from; nothing counts twice or is kept of the forgotten."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from serving_world import LATER, WAIT, Place, make_service, publish_world

from pipelines.datasets import RawLog
from pipelines.from_serving import Attribution, FromServing, contained, ingest_from_serving
from pipelines.impressions import is_positive
from pipelines.ingest import ingest
from pipelines.mapping import PositiveRule, SessionsConfig
from pipelines.prepare import PrepareConfig, prepare
from pipelines.publish import publish
from pipelines.quickstart import Job, QuickstartConfig
from pipelines.repeats import pass_over_repeats
from pipelines.replay import replay
from pipelines.settings import SplitConfig
from pipelines.shipped import find_config
from pipelines.train import train
from pipelines.train_config import load_config
from pipelines.workspace import Workspace
from ranking.availability import AVAILABILITY, AvailabilityFile
from ranking.bundle import Bundle
from ranking.recommender import Recommender
from ranking.recommender_config import Cap, RecommenderConfig
from ranking.snapshot import SnapshotReader, write_snapshot
from ranking.users import MAX_MOMENT
from recsys.errors import DataError
from recsys.messages import EventIn, EventsRequest, InlineEvent, RankRequest, RecommendRequest
from recsys.request_log import encode, files, read_file
from recsys.stores import Event
from recsys.terminal import Terminal
from serving.request_log import RequestLogConfig
from serving.service import Service
from serving.settings import load_into
from worlds import DAY, START, World, make_world

HOUR = DAY // 24
CONFIG = Path("pipelines/configs/mean_pooling.toml")
QUICK = ["stop.max_steps=60", "stop.validate_every=60", "stop.epochs=100", "stop.requests=100", "batches.rows=64"]
ROUNDS = (6, 12, 18)
"""Days the log has at first, after the first round, after the second."""
FORGOTTEN, LATE = "user-3", "user-5"


def user(number: int) -> str:
    return f"user-{number}"


def item(key: int) -> str:
    return f"item-{key}"


@dataclass
class Loop:
    """A workspace and a service on it, taken round by round."""

    world: World
    place: Workspace
    uri: str

    def begin(self) -> None:
        rows = [
            (user(number), item(key), moment)
            for number in range(len(self.world.histories))
            for key, moment in self.events(number, 0, ROUNDS[0])
        ]
        events = pl.LazyFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")
        codes = self.world.items.categorical[2:, 0].tolist()
        items = pl.LazyFrame({"item_id": map(item, range(len(codes))), "category": [f"category {c}" for c in codes]})
        ingest(RawLog("world", events, items), self.place.log)

    def events(self, number: int, first: int, last: int) -> list[tuple[int, int]]:
        history = self.world.histories.of(number)
        return list(zip(history.item[first:last].tolist(), history.time[first:last].tolist(), strict=True))

    def learn(self) -> float:
        """Prepare, train, publish; give how often the bundle ranks a user's last item above another."""
        place = self.place
        config = PrepareConfig(split=SplitConfig(valid_days=1, test_days=1), negatives=4, workers=1)
        previous = place.prepared.directory if place.prepared.directory.exists() else None
        prepared = prepare(place.parts, place.prepared.directory, config, previous=previous)
        name = f"run-{len(place.parts)}"
        trained = train(load_config(CONFIG, QUICK), prepared, place.run(name), self.uri)
        publish(prepared, trained, None, place.bundle, place.snapshot, {}, contained(prepared, place.parts))
        return self.quality()

    def quality(self) -> float:
        recommender = Recommender(Bundle.load(self.place.bundle), SnapshotReader(self.place.snapshot))
        draws = np.random.default_rng(0)
        shares = []
        for number in range(len(self.world.histories)):
            *before, (wanted, at) = self.events(number, 0, 10**6)
            inline = [InlineEvent(item_id=item(key), timestamp=moment) for key, moment in before]
            others = [item(int(key)) for key in draws.permutation(self.world.known)[:9] if key != wanted]
            request = RankRequest(history=inline, item_ids=[item(wanted), *others], at=at)
            scores = [-1e9 if score is None else score for score in recommender.rank(request, at).scores]
            shares.append(np.mean([(scores[0] > other) + 0.5 * (scores[0] == other) for other in scores[1:]]))
        return float(np.mean(shares))

    def serve(self) -> Service:
        served = Place(self.place.snapshot, self.place.bundle, self.place.bundle)
        return make_service(served, self.place.state, request_log=RequestLogConfig(share=1.0, segment_bytes=50_000))

    def live(self, service: Service, first: int, last: int) -> None:
        """Let every user be recommended something and then do what they do, day by day."""
        for day in range(first, last):
            posted = []
            for number in range(len(self.world.histories)):
                for key, moment in self.events(number, day, day + 1):
                    if number % 4 == 0 or user(number) in (FORGOTTEN, LATE):
                        service.recommend(RecommendRequest(user_id=user(number), at=moment - HOUR))
                    posted.append(EventIn(user_id=user(number), item_id=item(key), timestamp=moment))
            service.record(EventsRequest(events=posted))

    def take(self, last: int, window: int = DAY // 2) -> FromServing:
        return ingest_from_serving(self.place.state, self.place, Attribution(window, START + last * DAY - HOUR))

    def read(self, service: Service, name: str) -> list[int]:
        found = service.store.read(name)
        return [] if found is None else found.time.tolist()


@pytest.fixture(scope="module")
def loop(tmp_path_factory, mlflow_uri) -> Loop:
    loop = Loop(make_world(users=60, length=24, known=30), Workspace(tmp_path_factory.mktemp("loop")), mlflow_uri)
    loop.begin()
    return loop


def test_serving_teaches_twice_and_ends_with_a_better_model(loop):
    place = loop.place
    quality = [loop.learn()]
    for number, (first, last) in enumerate(pairwise(ROUNDS)):
        service = loop.serve()
        loop.live(service, first, last)
        if number == 0:
            late = EventIn(user_id=LATE, item_id="item-0", timestamp=START + DAY // 3, event_id="late")
            service.record(EventsRequest(events=[late]))
            forgotten = service.forget(FORGOTTEN)
            assert forgotten.posted_events == last - first
        before = {name: loop.read(service, name) for name in (LATE, "user-0", "user-1", FORGOTTEN)}
        service.close()
        same = replay(place.state, Bundle.load(place.bundle), SnapshotReader(place.snapshot))
        assert (same.replayed, same.identical, same.score_delta) == (same.replayed, same.replayed, 0.0)
        assert same.replayed > 50
        taken = loop.take(last)
        check_taken(loop, taken, number)
        quality.append(loop.learn())
        # The new snapshot holds what the log holds: over it and the same log, every history is what it was.
        service = loop.serve()
        assert {name: loop.read(service, name) for name in before} == before
        service.close()
        known = SnapshotReader(place.snapshot).read(FORGOTTEN)
        assert (known is None) == (number == 0)
        assert (FORGOTTEN in place.prepared.users["user_id"].to_list()) == (number > 0)
    assert known is not None
    assert min(known.time) >= START + ROUNDS[1] * DAY
    assert quality[2] > quality[0] + 0.03, quality


def test_a_quickstart_over_the_grown_log_publishes_a_snapshot_that_knows_what_it_contains(loop):
    """After the rounds above: what came back from serving is in the snapshot, and must not count over it too."""
    place, name = loop.place, "mqsa_ted"
    config = load_config(find_config(name), ["stop.max_steps=2", "stop.requests=20", "batches.rows=16"])
    train(config, place.prepared, place.run(name), loop.uri)
    service = loop.serve()
    before = loop.read(service, "user-0")
    service.close()
    Job(place, QuickstartConfig((name,), name), Terminal(), loop.uri)._publish({name: config})
    service = loop.serve()
    assert loop.read(service, "user-0") == before
    service.close()


def check_taken(loop: Loop, taken: FromServing, number: int) -> None:
    part = Path(str(taken.part))
    assert taken.left_out == 1  # the late one, in this round and the next
    assert (taken.verified > 50, taken.unverified) == (True, 0)
    impressions = pl.read_parquet(part / "impressions.parquet")
    assert impressions.height == taken.positives + taken.negatives > 0
    assert taken.positives > 20
    events = pl.read_parquet(part / "events.parquet")
    named = events["user_id"].to_list() + impressions["user_id"].to_list()
    assert (FORGOTTEN in named) == (number > 0)  # afterwards a life begins anew
    taken_items = events.rename({"timestamp": "taken"}).select("user_id", "item_id", "taken")
    after = impressions.join(taken_items, on=["user_id", "item_id"], how="left").with_columns(
        ((pl.col("taken") - pl.col("timestamp")).is_between(1, DAY // 2)).fill_null(False).alias("in time")
    )
    truth = after.group_by("request_id", "item_id").agg(pl.col("in time").any(), pl.col("label").first())
    assert truth["in time"].cast(pl.UInt8).equals(truth["label"])
    again = loop.take(ROUNDS[number + 1])
    assert (again.events, again.answers, again.part) == (0, 0, None)
    listed = json.loads((loop.place.root / "forgotten.json").read_text())
    assert listed == {FORGOTTEN: 1}


def test_a_history_that_was_not_served_as_it_is_rebuilt_stops_the_loop(loop, tmp_path):
    """After the rounds above: a digest in the request log that the event log does not explain."""
    service = loop.serve()
    loop.live(service, ROUNDS[-1], ROUNDS[-1] + 1)
    service.close()
    path = files(loop.place.state / "requests")[-1]
    answers = [answer for answer, _ in read_file(path)]
    path.write_bytes(b"".join(encode(replace(answer, history="0" * 16)) for answer in answers))
    parts = list(loop.place.parts)
    with pytest.raises(DataError, match="the one rebuilt up to position"):
        loop.take(ROUNDS[-1] + 2)
    assert loop.place.parts == parts
    path.write_bytes(b"".join(map(encode, answers)))
    part = pl.read_parquet(Path(str(loop.take(ROUNDS[-1] + 2).part)) / "impressions.parquet")
    assert set(part["label"]) == {0, 1}


def test_replay_counts_answers_made_with_other_rules_or_when_other_items_could_be_had(tmp_path):
    place, state = publish_world(tmp_path / "world"), tmp_path / "state"
    capped = RecommenderConfig(rules=(Cap("category", 2),))
    bundle, snapshot = Bundle.load(place.bundle), SnapshotReader(place.snapshot)
    requests = [RecommendRequest(user_id=f"user-{number}", k=5, at=LATER) for number in range(6)]

    def serve(asked: list[RecommendRequest]) -> list[str]:
        service = make_service(place, state, request_log=RequestLogConfig(share=1.0), recommender=capped)
        items = [item.item_id for request in asked for item in service.recommend(request).items]
        service.close()
        return items

    before = serve(requests[:3])
    AvailabilityFile(state / AVAILABILITY).put(dict.fromkeys(before, False))
    assert not {*serve(requests)} & {*before}
    found = replay(state, bundle, snapshot, capped)
    assert (found.replayed, found.other_settings, found.identical) == (9, 3, 6)
    assert "other settings     3" in found.text()
    found = replay(state, bundle, snapshot)
    assert (found.replayed, found.other_settings, found.identical < 6) == (9, 9, True)


def test_answers_whose_window_has_not_passed_wait(loop):
    service = loop.serve()
    loop.live(service, ROUNDS[-1] + 1, ROUNDS[-1] + 2)
    service.close()
    taken = loop.take(ROUNDS[-1] + 2, window=9 * DAY)
    assert (taken.answers, taken.waiting > 0) == (0, True)
    service = loop.serve()
    loop.live(service, ROUNDS[-1] + 2, ROUNDS[-1] + 3)
    service.close()
    assert loop.take(ROUNDS[-1] + 20, window=9 * DAY).answers > taken.waiting


# --- one service, some answers, taken in now and later


@dataclass
class Small:
    """A workspace over a published world, and a service that logs every answer."""

    place: Workspace
    world: Place

    @contextmanager
    def serving(self) -> Iterator[Service]:
        logs = RequestLogConfig(share=1.0)
        service = make_service(self.world, self.place.state, self.place.bundle, request_log=logs)
        yield service
        service.close()

    def take(self, as_of: int, window: int = DAY) -> FromServing:
        return ingest_from_serving(self.place.state, self.place, Attribution(window, as_of))

    def impressions(self) -> list[tuple[str, str, int]]:
        """All positives so far: user, item and the answer's moment."""
        found = []
        for part in self.place.parts:
            if (part / "impressions.parquet").exists():
                rows = pl.read_parquet(part / "impressions.parquet").filter(pl.col("label") == 1)
                found += rows.select("user_id", "item_id", "timestamp").rows()
        return found


@pytest.fixture
def small(tmp_path) -> Small:
    world, place = publish_world(tmp_path / "world"), Workspace(tmp_path / "place")
    place.root.mkdir()
    shutil.copytree(world.bundle, place.bundle)
    shutil.copytree(world.snapshot, place.snapshot)
    return Small(place, world)


def did(service: Service, name: str, thing: str, at: int) -> None:
    service.record(EventsRequest(events=[EventIn(user_id=name, item_id=thing, timestamp=at)]))


def was_shown(service: Service, name: str, at: int) -> str:
    """Recommend something, and give the first item."""
    return service.recommend(RecommendRequest(user_id=name, at=at, k=5)).items[0].item_id


def test_who_was_forgotten_while_an_answer_waited_does_not_come_back(small):
    with small.serving() as service:
        did(service, "bob", "item-1", LATER)
        thing = was_shown(service, "bob", LATER + HOUR)
        did(service, "bob", thing, LATER + 2 * HOUR)
        service.forget("bob")
        did(service, "carl", "item-2", LATER + 2 * HOUR)
    assert small.take(LATER + 3 * HOUR).answers == 0
    with small.serving() as service:
        did(service, "carl", "item-3", LATER + 30 * HOUR)
    assert small.take(LATER + 3 * DAY).answers == 0
    assert small.impressions() == []


def test_answers_wait_where_no_event_was_posted_to_make_a_part_of(small):
    with small.serving() as service:
        did(service, "bob", "item-1", LATER)
        thing = was_shown(service, "bob", LATER + HOUR)
        did(service, "bob", thing, LATER + 2 * HOUR)
    assert small.take(LATER + 3 * HOUR).waiting == 1
    for _ in range(2):
        taken = small.take(LATER + 3 * DAY)
        told = (taken.answers, taken.positives, taken.negatives, taken.waiting, taken.part)
        assert told == (0, 0, 0, 1, None)
    with small.serving() as service:
        did(service, "carl", "item-3", LATER + 2 * DAY)
    taken = small.take(LATER + 3 * DAY)
    assert (taken.answers, taken.positives, taken.negatives, taken.waiting) == (1, 1, 4, 0)


def test_an_event_without_a_value_is_no_positive_where_one_is_wanted():
    event = Event("e", "u", "i", 1, "rate")
    for value, enough in [(None, False), (3.0, False), (4.0, True)]:
        assert is_positive(replace(event, value=value), PositiveRule(min_value=4)) == enough
        assert is_positive(replace(event, value=value), PositiveRule())


@pytest.mark.parametrize("named", [False, True])
def test_sessions_are_cut_as_those_of_the_log(small, named):
    """A visit that was served is one request again: its purchase does not have its own view for a history.

    Where the log's sessions have names, which a posted event can't tell, by the usual gap.
    """
    rule, gap = PositiveRule(("purchase",)), 30 * HOUR // 60
    log = pl.LazyFrame({"user_id": ["al"], "item_id": ["item-0"], "timestamp": [LATER - DAY], "action": ["purchase"]})
    log, sessions = (log.with_columns(session_id=pl.lit("s1")), None) if named else (log, "30m")
    ingest(RawLog("shop", log, positive=rule, sessions=SessionsConfig(sessions)), small.place.log)
    moments = [0, gap, 2 * gap, 3 * gap + 1]  # the last was away a microsecond too long
    posted = [EventIn(user_id="bob", item_id="item-1", timestamp=LATER + at, action="view") for at in moments]
    posted.append(EventIn(user_id="carl", item_id="item-1", timestamp=LATER + gap, action="view"))
    with small.serving() as service:
        service.record(EventsRequest(events=posted))
    part = Path(str(small.take(LATER + DAY).part))
    events = pl.read_parquet(part / "events.parquet")
    assert events["value"].null_count() == len(events)  # none was posted, which is not 0
    found = events.select("user_id", "timestamp", "session_id").rows()
    begins = {("bob", at): LATER if at <= LATER + 2 * gap else at for _, at, _ in found}
    assert sorted(found) == [
        *(("bob", LATER + at, str(begins["bob", LATER + at])) for at in moments),
        ("carl", LATER + gap, str(LATER + gap)),
    ]
    card = json.loads((part / "ingest.json").read_text())
    assert (card["sessions"], card["positive"]["actions"]) == ({"gap": "30m"}, ["purchase"])


def test_an_event_counts_for_the_last_answer_even_while_that_one_waits(small):
    with small.serving() as service:
        did(service, "bob", "item-1", LATER)
        first = was_shown(service, "bob", LATER + 1)
        assert was_shown(service, "bob", LATER + DAY // 2) == first
        did(service, "bob", first, LATER + DAY // 2 + HOUR)
    assert small.take(LATER + DAY + 2).answers == 1
    with small.serving() as service:
        did(service, "carl", "item-3", LATER + 2 * DAY)
    assert small.take(LATER + 3 * DAY).answers == 1
    assert small.impressions() == [("bob", first, LATER + DAY // 2)]


def test_answers_that_waited_while_another_bundle_was_published_are_used(small):
    with small.serving() as service:
        did(service, "bob", "item-1", LATER)
        thing = was_shown(service, "bob", LATER + HOUR)
        did(service, "bob", thing, LATER + 2 * HOUR)
    assert small.take(LATER + 3 * HOUR).waiting == 1
    shutil.rmtree(small.place.bundle)
    shutil.copytree(small.world.smaller, small.place.bundle)
    with small.serving() as service:
        did(service, "carl", "item-3", LATER + 2 * DAY)
    taken = small.take(LATER + 3 * DAY)
    assert (taken.answers, taken.verified, taken.unverified) == (1, 0, 1)
    assert small.impressions() == [("bob", thing, LATER + HOUR)]


def test_an_answer_for_a_far_future_is_not_waited_for(small):
    with small.serving() as service:
        did(service, "bob", "item-1", LATER)
        was_shown(service, "eve", MAX_MOMENT - 1)
        thing = was_shown(service, "bob", LATER + HOUR)
        did(service, "bob", thing, LATER + 2 * HOUR)
    taken = small.take(LATER + 3 * DAY)
    assert (taken.answers, taken.waiting) == (1, 0)


def test_a_post_that_waits_behind_a_swap_is_named_by_the_new_bundle(small, monkeypatch):
    """The post has begun under the bundle that does not know its item, and is applied after the new one's rebuild."""
    with small.serving() as service:
        load_into(service, small.world.smaller)
        did(service, "carl", "item-60", LATER)  # what makes the swap rebuild
        assert service.store.unknown_events == 1
        append, begun, swapped = service.state.log.append, threading.Event(), threading.Event()

        def slow(events):
            begun.set()
            assert swapped.wait(WAIT)
            return append(events)

        with ThreadPoolExecutor(1) as other:
            monkeypatch.setattr(service.state.log, "append", slow)
            posting = other.submit(did, service, "bob", "item-60", LATER)
            assert begun.wait(WAIT)
            load_into(service, small.world.bundle)
            swapped.set()
            posting.result(WAIT)
        assert service.store.unknown_events == 0
        was_shown(service, "bob", LATER + HOUR)
        load_into(service, small.world.smaller)  # and back: the view keeps keys that this one does not know
        was_shown(service, "carl", LATER + HOUR)
        load_into(service, small.world.bundle)
    taken = small.take(LATER + 3 * DAY)
    assert (taken.verified, taken.other_history) == (1, 0)  # the other was answered by a bundle that is not here


def test_what_a_nightly_log_brings_too_counts_once(tmp_path):
    """A log that holds the posted events, but one, is published over the service's own: histories hold each once."""
    world, place = publish_world(tmp_path / "world"), Workspace(tmp_path / "place")
    posted = [
        EventIn(user_id=name, item_id=f"item-{day}", timestamp=LATER + day * DAY + 1, action="view")
        for day in range(5)
        for name in ("al", "bob")
    ]
    renamed = EventIn(user_id="al", item_id="item-9", timestamp=LATER + 9 * DAY + 1, event_id="order 9")
    odd = EventIn(user_id="bob", item_id="item-3", timestamp=LATER + DAY + 7, action="view")  # the log lacks it
    with running(world, place.state) as service:
        service.record(EventsRequest(events=[*posted[:4], odd, *posted[4:], renamed]))
    rows = [(each.user_id, each.item_id, each.timestamp, "view", None) for each in posted]
    rows += [("al", "item-1", LATER - n * DAY, "view", None) for n in range(1, 4)]
    rows.append(("al", "item-9", LATER + 9 * DAY, "order", "order 9"))  # written in another way, the id is the same
    names = ["user_id", "item_id", "timestamp", "action", "event_id"]
    ingest(RawLog("nightly", pl.LazyFrame(rows, names, orient="row")), place.log)
    split = SplitConfig(valid_days=1, test_days=1)
    done = prepare(place.log, place.prepared.directory, PrepareConfig(split=split, negatives=2, workers=1))
    bare = contained(done, place.parts)
    found = pass_over_repeats(done, place.parts, bare, place.state)
    assert (bare, found.contained, found.twice) == ([], 11, 0)
    assert found.told() == ["11 posted events are in the log too; histories count them once."]
    (mark,) = found.marks
    assert len(mark.left_out) == 1
    assert pass_over_repeats(done, place.parts, found.marks, place.state).marks == found.marks
    later = EventIn(user_id="bob", item_id="item-3", timestamp=LATER + 20 * DAY)
    histories = {}
    for marks in ([], found.marks):
        write_snapshot(world.snapshot, done.users["user_id"].to_list(), done.histories, "digest", marks)
        with running(world, place.state) as service:
            service.record(EventsRequest(events=[later.model_copy(update={"event_id": "later"})]))
            histories[len(marks)] = {name: service.store.read(name).time.tolist() for name in ("al", "bob")}
    of_log = {name: sorted(row[2] for row in rows if row[0] == name) for name in ("al", "bob")}
    assert histories[1]["al"] == of_log["al"]
    assert histories[1]["bob"] == sorted([*of_log["bob"], odd.timestamp, later.timestamp])
    assert len(histories[0]["bob"]) == len(histories[1]["bob"]) + 5  # without a mark each counts twice


def test_no_mark_passes_a_forgotten_user_whom_the_log_still_holds(tmp_path):
    world, place = publish_world(tmp_path / "world"), Workspace(tmp_path / "place")
    moments = [LATER + day * DAY for day in range(4)]
    with running(world, place.state) as service:
        did(service, "al", "item-0", moments[0])
        did(service, "carl", "item-0", moments[0])
        service.forget("carl")  # no event of carl is in the log: nothing speaks against passing
        did(service, "al", "item-0", moments[1])
        service.forget("bob")
        did(service, "al", "item-0", moments[2])
    rows = [(name, "item-0", moment) for name in ("al", "bob") for moment in moments]
    ingest(RawLog("nightly", pl.LazyFrame(rows, ["user_id", "item_id", "timestamp"], orient="row")), place.log)
    split = SplitConfig(valid_days=1, test_days=1)
    done = prepare(place.log, place.prepared.directory, PrepareConfig(split=split, negatives=1, workers=1))
    found = pass_over_repeats(done, place.parts, [], place.state)
    assert (found.contained, found.twice, found.marks[0].left_out) == (2, 1, ())
    assert "count twice in live histories" in found.told()[1]
    assert pass_over_repeats(done, place.parts, [], tmp_path / "nowhere").marks == []


@contextmanager
def running(world: Place, state: Path) -> Iterator[Service]:
    service = make_service(world, state)
    yield service
    service.close()
