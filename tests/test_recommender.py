"""The request path: what it answers is what the model says of the events strictly before the moment, and no more."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from ranking.batch import FIRST_ITEM, UNKNOWN, assemble
from ranking.bundle import Bundle, Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.models import RANKERS
from ranking.recommender import Recommender, RecommenderConfig
from ranking.sources import Followers, Popularity, Proposal, Repeats, SourceQuery, merge
from recsys.errors import ConfigError, RequestError
from recsys.history import DAY, UNKNOWN_KEY, Events
from recsys.messages import MAX_CANDIDATES, InlineEvent, RankRequest, RecommendRequest

WORLD = worlds.make_world(users=60, length=20, known=50, repeats=0.2)
ITEMS = [f"item-{key}" for key in range(len(WORLD.key_to_row))]
NOW = worlds.START + 100 * DAY
SMALL = {
    "mqsa_ted": {"width": 8, "window": 10},
    "sdim": {"window": 12, "recent": 5},
    "dare": {"window": 12, "retrieved": 5},
    "eta": {"window": 12, "retrieved": 5},
    "sim_hard": {"window": 12, "retrieved": 5},
    "popularity": {},
    "lightgbm": {},
}
"""Windows shorter than the histories, so that a wrong cut shows."""


@dataclass
class Store:
    """Histories in memory: user `u<n>` has the world's n-th history."""

    extra: dict[str, Events] = field(default_factory=dict)

    def read(self, user_id: str) -> Events | None:
        if user_id in self.extra:
            return self.extra[user_id]
        return WORLD.histories.of(int(user_id[1:])) if user_id.startswith("u") else None


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a loaded bundle of a ranker with MQSA-TED retrieval; weights are random, so every item scores apart."""
    bundles = {}

    def named(name: str) -> NamedModel:
        return worlds.named_model(name, WORLD, SMALL.get(name, {"window": 12}), seed=1)

    def bundle(name: str, retriever: bool = True) -> Bundle:
        if (name, retriever) not in bundles:
            directory = tmp_path_factory.mktemp("bundle") / "bundle"
            contents = Contents(
                WORLD.items,
                ["", "", *ITEMS],
                ["", "", *(item.upper() for item in ITEMS)],
                WORLD.key_to_row,
                {},
                ["", "purchase"],
                named(name),
                named("mqsa_ted") if retriever else None,
            )
            write_bundle(directory, contents, worlds.PROVENANCE)
            bundles[name, retriever] = Bundle.load(directory)
        return bundles[name, retriever]

    return bundle


def model_scores(bundle, events, at, rows):
    """What the model itself says, with one candidate at a time and nothing cut off before it."""
    if not rows:
        return np.empty(0)
    batch = assemble(
        events,
        np.zeros(len(rows), np.int64),
        np.full(len(rows), len(events)),
        np.full(len(rows), at),
        np.array(rows, np.int32)[:, None],
        WORLD.key_to_row,
    )
    return worlds.scores(bundle.ranker, batch)[:, 0].numpy()


def close(a, b):
    return np.all(np.abs(np.asarray(a) - b) <= 1e-6 * np.maximum(1, np.abs(b)))


@pytest.mark.parametrize("name", sorted(RANKERS))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_answers_are_the_models_over_events_before_the_moment(load, name, data):
    bundle = load(name)
    recommender = Recommender(bundle, Store())
    user = data.draw(st.integers(0, 59))
    events = WORLD.histories.of(user)
    at = int(data.draw(st.sampled_from(events.time[1:].tolist())))
    k = data.draw(st.integers(1, 60))
    answer = recommender.recommend(RecommendRequest(user_id=f"u{user}", k=k, at=at), NOW)
    seen = events.slice(0, int((events.time < at).sum()))
    assert answer.history_events == len(seen)
    assert answer.user_known
    assert answer.model_version == bundle.version
    rows = [bundle.row_of[item.item_id] for item in answer.items]
    scores = np.array([item.score for item in answer.items])
    assert len(set(rows)) == len(rows) == k - answer.shortfall
    assert close(scores, model_scores(bundle, seen, at, rows))
    assert [item.name for item in answer.items] == [item.item_id.upper() for item in answer.items]
    assert sorted(zip(-scores, rows, strict=True)) == list(zip(-scores, rows, strict=True))
    asked = data.draw(st.lists(st.sampled_from([*ITEMS, "nothing", "else"]), min_size=1, max_size=70))
    ranked = recommender.rank(RankRequest(user_id=f"u{user}", item_ids=asked, at=at), NOW)
    known = [item for item in asked if item in bundle.row_of]
    assert ranked.unknown_item_ids == list(dict.fromkeys(item for item in asked if item not in bundle.row_of))
    assert [score is None for score in ranked.scores] == [item not in bundle.row_of for item in asked]
    given_scores = [score for score in ranked.scores if score is not None]
    assert close(given_scores, model_scores(bundle, seen, at, [bundle.row_of[item] for item in known]))
    by_score = dict(zip(known, given_scores, strict=True))
    assert ranked.ranked == sorted(by_score, key=lambda item: (-by_score[item], bundle.row_of[item]))
    # What is recommended scores the same when it is ranked, alone or among others.
    for items in ([item.item_id for item in answer.items], [answer.items[0].item_id]):
        again = recommender.rank(RankRequest(user_id=f"u{user}", item_ids=items, at=at), NOW)
        assert close(again.scores, scores[: len(items)])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_later_events_and_the_order_of_an_inline_history_do_not_matter(load, data):
    bundle = load("dare")
    item = st.integers(0, len(ITEMS) - 1)
    past = data.draw(st.dictionaries(st.integers(NOW - 90 * DAY, NOW - 1), item, min_size=1, max_size=25))
    later = data.draw(st.dictionaries(st.integers(NOW, NOW + DAY), item, max_size=5))
    ordered = sorted(past.items())
    stored = Events(
        np.array([key for _, key in [*ordered, *sorted(later.items())]], np.uint32),
        np.ones(len(past) + len(later), np.uint8),
        np.array([time for time, _ in [*ordered, *sorted(later.items())]], np.int64),
    )
    shuffled = data.draw(st.permutations([*past.items(), *later.items()]))
    inline = [InlineEvent(item_id=ITEMS[key], timestamp=time, action="purchase") for time, key in shuffled]
    recommender = Recommender(bundle, Store({"stored": stored, "past": stored.slice(0, len(past))}))
    requests = [
        RecommendRequest(user_id="stored", at=NOW),
        RecommendRequest(user_id="past", at=NOW),
        RecommendRequest(user_id="past", at=None),
        RecommendRequest(history=inline, at=NOW),
        RecommendRequest(user_id="u0", history=inline, at=NOW),  # the inline history is used instead
    ]
    first, *others = [recommender.recommend(request, NOW) for request in requests]
    for other in others:
        assert other.items == first.items
        assert other.history_events == first.history_events == len(past)


@settings(max_examples=30, deadline=None)
@given(user=st.integers(0, 59), k=st.integers(1, 80), retriever=st.booleans())
def test_exclude_seen_never_gives_a_seen_item_and_fills_up_while_there_are_others(load, user, k, retriever):
    bundle = load("personal_frequency", retriever)
    recommender = Recommender(bundle, Store(), RecommenderConfig(retrieval=1, repeats=1, transitions=1, popularity=1))
    answer = recommender.recommend(RecommendRequest(user_id=f"u{user}", k=k, exclude_seen=True), NOW)
    seen = {ITEMS[key] for key in WORLD.histories.of(user).item}
    given_ = {item.item_id for item in answer.items}
    assert not given_ & seen
    assert len(answer.items) == min(k, len(ITEMS) - len(seen))
    assert answer.shortfall == k - len(answer.items)


def test_nothing_known_is_answered_by_popularity(load):
    bundle = load("dare")
    recommender = Recommender(bundle, Store({"silent": Events.empty()}))
    count = WORLD.items.count.numpy()
    best = sorted(range(FIRST_ITEM, len(count)), key=lambda row: (-count[row], row))
    trained = int(WORLD.items.trained.sum())
    assert trained < len(best)
    for request in (
        {"user_id": "nobody"},
        {"user_id": "silent"},
        {"user_id": ""},
        {"history": []},
        {"user_id": "u0", "at": worlds.START},  # before the first event
    ):
        answer = recommender.recommend(RecommendRequest(k=1000, **request), NOW)
        assert not answer.user_known
        assert answer.history_events == 0
        assert [bundle.row_of[item.item_id] for item in answer.items] == best
        assert answer.shortfall == 1000 - len(best)
        sources = [item.sources for item in answer.items]
        assert sources == [["popularity"]] * trained + [["catalogue"]] * (len(best) - trained)
        ranked = recommender.rank(RankRequest(item_ids=ITEMS, **request), NOW)
        assert not ranked.user_known
        np.testing.assert_allclose(ranked.scores, np.log1p(count[2:]), rtol=1e-6)
        scores = dict(zip(ITEMS, ranked.scores, strict=True))
        assert all(item.score == scores[item.item_id] for item in answer.items)


def test_a_history_of_unknown_items_is_known_and_finite(load):
    answer = Recommender(load("dare"), Store()).recommend(
        RecommendRequest(history=[InlineEvent(item_id="nothing", timestamp=NOW - 1)]), NOW
    )
    assert answer.user_known
    assert len(answer.items) == 10
    assert np.isfinite([item.score for item in answer.items]).all()


def test_only_the_newest_events_within_the_limit_count(load):
    events = WORLD.histories.of(0)
    limited = Recommender(load("personal_frequency"), Store(), RecommenderConfig(history_limit=5))
    cut = Recommender(load("personal_frequency"), Store({"cut": events.slice(len(events) - 5, len(events))}))
    a = limited.recommend(RecommendRequest(user_id="u0", exclude_seen=True), NOW)
    b = cut.recommend(RecommendRequest(user_id="cut", exclude_seen=True), NOW)
    assert a.history_events == 5
    assert a.items == b.items


def test_one_model_in_both_roles_encodes_once(load, monkeypatch):
    bundle = load("mqsa_ted")
    assert bundle.ranker is bundle.retriever
    once = Recommender(bundle, Store())
    twice = Recommender(bundle, Store())
    monkeypatch.setattr(twice._scorer, "_shares_encode", False)
    calls = []
    encode = bundle.ranker.encode
    monkeypatch.setattr(bundle.ranker, "encode", lambda history: calls.append(1) or encode(history))
    for user in range(5):
        request = RecommendRequest(user_id=f"u{user}", k=30)
        calls.clear()
        answer = once.recommend(request, NOW)
        assert len(calls) == 1
        assert answer.items == twice.recommend(request, NOW).items
        assert len(calls) == 3


def test_equal_scores_are_ordered_by_row(load):
    bundle = load("popularity")
    count = WORLD.items.count.numpy()
    assert len(set(count[2:])) < len(count[2:])
    ranked = Recommender(bundle, Store()).rank(RankRequest(user_id="u0", item_ids=ITEMS[::-1]), NOW).ranked
    assert ranked == [ITEMS[key] for key in np.lexsort((np.arange(len(ITEMS)), -count[2:]))]


def test_refused_requests(load):
    recommender = Recommender(load("popularity"), Store())
    many = ["item-0"] * MAX_CANDIDATES
    assert len(recommender.rank(RankRequest(user_id="u0", item_ids=many), NOW).scores) == MAX_CANDIDATES
    with pytest.raises(RequestError, match=r"10001 items to rank; at most 10000") as error:
        recommender.rank(RankRequest(user_id="u0", item_ids=[*many, "item-0"]), NOW)
    assert (error.value.status, error.value.code) == (413, "too_many_candidates")
    for ask in (
        lambda: recommender.rank(RankRequest(item_ids=["item-0"]), NOW),
        lambda: recommender.recommend(RecommendRequest(), NOW),
    ):
        with pytest.raises(RequestError, match="neither user_id nor history") as error:
            ask()
        assert (error.value.status, error.value.code) == (422, "no_user")
    late = InlineEvent(item_id="item-0", timestamp=10**30)
    for request, where in (
        (RecommendRequest(user_id="u0", at=-(10**30)), "at is"),
        (RecommendRequest(history=[late.model_copy(update={"timestamp": 0}), late]), r"history\[1\].timestamp is"),
    ):
        with pytest.raises(RequestError, match=where) as error:
            recommender.recommend(request, NOW)
        assert (error.value.status, error.value.code) == (422, "invalid_time")
    with pytest.raises(ConfigError, match=r"\[recommender\] repeats is -1"):
        RecommenderConfig(repeats=-1)
    with pytest.raises(ConfigError, match=r"\[recommender\] half_life_days is 0"):
        RecommenderConfig(half_life_days=0)


@settings(max_examples=40, deadline=None)
@given(user=st.integers(0, 59), quotas=st.lists(st.integers(0, 8), min_size=4, max_size=4), exclude_seen=st.booleans())
def test_every_item_names_the_sources_that_proposed_it(load, user, quotas, exclude_seen):
    config = RecommenderConfig(*quotas)
    bundle = load("dare")
    k = 4
    answer = Recommender(bundle, Store(), config).recommend(
        RecommendRequest(user_id=f"u{user}", k=k, exclude_seen=exclude_seen), NOW
    )
    names = ("retrieval", "repeats", "transitions", "popularity")
    possible = {name for name, quota in zip(names, quotas, strict=True) if quota} | {"catalogue"}
    given_ = Counter(source for item in answer.items for source in item.sources)
    assert all(item.sources for item in answer.items)
    assert set(given_) <= possible
    assert len(answer.items) == k
    if not exclude_seen and quotas[3]:
        assert "catalogue" not in given_  # it is asked only where the others leave too few
    seen = {ITEMS[key] for key in WORLD.histories.of(user).item}
    for item in answer.items:
        if "repeats" in item.sources:
            assert item.item_id in seen


def query(user: int, blocked: set[int] = frozenset()) -> SourceQuery:
    events = WORLD.histories.of(user)
    rows = WORLD.key_to_row[events.item].copy()
    rows[0] = UNKNOWN
    allowed = np.ones(len(WORLD.items), bool)
    allowed[:FIRST_ITEM] = False
    allowed[list(blocked)] = False
    return SourceQuery(rows, events.time, NOW, None, allowed, int((~allowed).sum()))


@settings(max_examples=60, deadline=None)
@given(user=st.integers(0, 59), limit=st.integers(1, 60), blocked=st.sets(st.integers(2, 51), max_size=20))
def test_sources_by_their_definition(user, limit, blocked):
    q = query(user, blocked)
    fine = [row for row in range(FIRST_ITEM, len(WORLD.items)) if row not in blocked]
    decayed = defaultdict(float)
    for row, time in zip(q.rows.tolist(), q.time.tolist(), strict=True):
        decayed[row] += 2.0 ** (-(NOW - time) / (30 * DAY))
    best = sorted((row for row in fine if row in decayed), key=lambda row: (-round(decayed[row], 9), row))
    assert Repeats(30.0).propose(q, limit).rows.tolist() == best[:limit]

    count = WORLD.items.count.numpy()
    popular = sorted((row for row in fine if count[row]), key=lambda row: (-count[row], row))
    assert Popularity(WORLD.items).propose(q, limit).rows.tolist() == popular[:limit]

    follow = defaultdict(float)
    for row in list(dict.fromkeys(q.rows[::-1].tolist()))[:3]:
        target, weight = (part.double().tolist() for part in WORLD.items.transitions.of(row))
        heaviest = sorted(weight, reverse=True)[:4]
        for to, w in zip(target, weight, strict=True):
            if len(weight) <= 4 or w > heaviest[-1]:  # which of several equal edges is kept is not promised
                follow[int(to)] += w / sum(weight)
    proposed = Followers(WORLD.items, recent=3, edges=4).propose(q, 1000).rows.tolist()
    assert len(set(proposed)) == len(proposed)
    assert {row for row in follow if row in fine} <= set(proposed) <= set(fine)
    everything = Followers(WORLD.items, recent=3, edges=1000).propose(replace(q), limit).rows.tolist()
    follow = defaultdict(float)
    for row in list(dict.fromkeys(q.rows[::-1].tolist()))[:3]:
        target, weight = WORLD.items.transitions.of(row)
        for to, share in zip(target.tolist(), (weight.double() / weight.double().sum()).tolist(), strict=True):
            follow[to] += share
    ranked = sorted((round(follow[row], 5) for row in fine if row in follow), reverse=True)[:limit]
    np.testing.assert_allclose([follow[row] for row in everything], ranked, atol=2e-5)


@given(st.lists(st.lists(st.integers(2, 30), unique=True), max_size=4))
def test_merge_is_the_union(proposals):
    pool = merge([Proposal(np.array(rows, np.int32), np.array(rows, np.float32)) for rows in proposals])
    assert pool.rows.tolist() == sorted(set().union(*proposals))
    for number, rows in enumerate(proposals):
        proposed = pool.rank[number] > 0
        places = pool.rank[number][proposed]
        assert pool.rows[proposed][np.argsort(places)].tolist() == rows
        assert sorted(places) == list(range(1, len(rows) + 1))
        assert pool.value[number][proposed].tolist() == pool.rows[proposed].tolist()
        assert np.isnan(pool.value[number][~proposed]).all()


def test_timings_are_seconds_that_add_up(load):
    answer = Recommender(load("dare"), Store()).recommend(RecommendRequest(user_id="u0"), NOW)
    assert list(answer.timings) == ["history", "filter", "encode", "sources", "score", "rules", "top_k", "total"]
    *stages, total = answer.timings.values()
    assert sum(stages) == pytest.approx(total)
    assert answer.degraded == []


def test_events_of_unknown_keys_are_the_unknown_row(load):
    events = WORLD.histories.of(1)
    item = events.item.copy()
    item[2] = UNKNOWN_KEY
    item[3] = len(WORLD.key_to_row) + 7  # an item first seen after this bundle was published
    store = Store({"new": Events(item, events.action, events.time)})
    answer = Recommender(load("dare"), store).recommend(RecommendRequest(user_id="new", exclude_seen=True), NOW)
    assert len(answer.items) == 10
    assert answer.history_events == len(events)


def test_many_threads_get_what_one_gets(load):
    """Handlers share one recommender; FAISS and torch bring an OpenMP each, and neither waits for the other."""
    recommender = Recommender(load("dare"), Store())
    requests = [RecommendRequest(user_id=f"u{n % 60}", k=20, exclude_seen=n % 2 == 0) for n in range(120)]
    alone = [recommender.recommend(request, NOW).items for request in requests]
    with ThreadPoolExecutor(4) as pool:
        together = [answer.items for answer in pool.map(lambda request: recommender.recommend(request, NOW), requests)]
    assert together == alone
