"""Kept states: whatever happens to histories, cache and bundles, an answer is that of a rebuild, bit for bit."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from ranking.bundle import Bundle, Contents, write_bundle
from ranking.ladder import Ladder
from ranking.recommender import Recommender
from ranking.recommender_config import StatesConfig
from ranking.state_cache import Entry, Seen, StateCache, States, Vectors, model_digest
from ranking.users import Users
from recsys.errors import ConfigError
from recsys.history import Events
from recsys.messages import InlineEvent, RankRequest, RecommendRequest

WORLD = worlds.make_world(users=30, length=20, known=50)
ITEMS = [f"item-{key}" for key in range(len(WORLD.key_to_row))]
NOW = worlds.START + 10_000
MODELS = {
    "sdim": {"window": 6, "recent": 3},
    "sdim, one basket": {"window": 12, "recent": 5, "norm": "ratio"},
    "sdim, actions": {"window": 6, "recent": 3, "actions": True},
    "dare": {"window": 6, "retrieved": 3, "pos_mode": "group"},
    "dare, own counts": {"window": 5, "retrieved": 3, "own_counts": True},
    "dare, actions": {
        "window": 5,
        "retrieved": 3,
        "own_counts": True,
        "attention": {"action": 2},
        "representation": {"action": 2},
    },
}


@dataclass
class Store:
    """Histories in memory that may also lose events, as a bounded store does."""

    events: dict[str, Events] = field(default_factory=dict)

    def read(self, user_id: str) -> Events | None:
        return self.events.get(user_id)

    def add(self, user_id, key, time, action=0):
        one = Events(np.array([key], np.uint32), np.array([action], np.uint8), np.array([time], np.int64))
        self.events[user_id] = Events.concatenate(self.events.get(user_id, Events.empty()), one)

    def learn(self, user_id, place, action):
        if len(known := self.events.get(user_id, Events.empty())):
            actions = known.action.copy()
            actions[-1 - place % len(actions)] = action
            self.events[user_id] = Events(known.item, actions, known.time)

    def drop_oldest(self, user_id, count):
        if user_id in self.events:
            self.events[user_id] = self.events[user_id].slice(count, len(self.events[user_id]))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two bundles of each model with other weights, and one with the first's weights and another retriever."""

    def bundle(name, seed, retriever):
        directory = tmp_path_factory.mktemp("bundle") / "bundle"
        ids = ["", "", *ITEMS]
        ranker = worlds.named_model(name.split(",")[0], WORLD, MODELS[name], seed)
        finder = worlds.named_model("mqsa_ted", WORLD, {"width": 8, "window": 10}, retriever)
        contents = Contents(WORLD.items, ids, ids, WORLD.key_to_row, {}, ["", "buy", "view"], ranker, finder)
        write_bundle(directory, contents, worlds.PROVENANCE)
        return Bundle.load(directory)

    return {name: [bundle(name, 1, 1), bundle(name, 2, 1), bundle(name, 1, 2)] for name in MODELS}


def tensors(state):
    return [state] if isinstance(state, torch.Tensor) else [part for each in state for part in tensors(each)]


STEP = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 49), st.integers(0, 2)),  # time since the newest; 0 is one basket
    st.tuples(st.just("append"), st.integers(0, 49), st.integers(0, 2)),
    st.tuples(st.just("late"), st.integers(0, 49), st.integers(1, 30)),
    st.tuples(st.just("evict"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("learn"), st.integers(0, 5), st.integers(0, 2)),  # another bundle knows an event's action
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
    st.tuples(st.just("swap"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("forget"), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("ab"), STEP), min_size=4, max_size=30), room=st.sampled_from([2, 10**6])
)
def test_any_order_of_events_equals_a_rebuild(bundles, name, steps, room):
    store, now, bundle = Store(), [0.0], bundles[name][0]
    one = 30_000 if name.startswith("sdim") else 1_200  # bytes of about one entry
    config = StatesConfig(bytes=room * one, seconds=60, least_events=2)
    cache = StateCache(config, lambda: now[0])
    newest = {"a": worlds.START, "b": worlds.START}
    for user, (kind, number, other) in steps:
        if kind == "append":
            newest[user] += other
            store.add(user, number, newest[user], number % 3)
        elif kind == "late":
            store.add(user, number, newest[user] - other, number % 3)
        elif kind == "evict":
            store.drop_oldest(user, number)
        elif kind == "learn":
            store.learn(user, number, other)
        elif kind == "restart":
            cache = StateCache(config, lambda: now[0])
        elif kind == "swap":
            bundle = bundles[name][number]
        elif kind == "forget":
            store.events.pop(user, None)
            cache.forget(user)
        else:
            now[0] += number
        with torch.inference_mode():
            found = Users(bundle, store, 10).read(user, None, NOW, NOW, Ladder(None))
            plain = Recommender(bundle, store)._scorer
            rebuilt = plain.encode_ranker(found, Ladder(None)).state
            kept = States(bundle, cache).of(found, lambda rebuilt=rebuilt: rebuilt)
            vector = plain.encode(found, Ladder(None)).vector
            assert np.array_equal(
                Vectors(bundle, cache).of(found, lambda v=vector: torch.from_numpy(v)).numpy(), vector
            )
        for mine, theirs in zip(tensors(kept), tensors(rebuilt), strict=True):
            assert torch.equal(mine, theirs)
        assert cache.counts.bytes == sum(entry.bytes for entry, _ in cache._entries.values()) <= config.bytes
        assert cache.counts.entries == len(cache._entries)
    if found.known:
        asked = RecommendRequest(user_id=user, k=7, at=NOW)
        cached = Recommender(bundle, store, states=cache)
        for _ in range(2):
            assert cached.recommend(asked, NOW).items == Recommender(bundle, store).recommend(asked, NOW).items
        ranked = RankRequest(user_id=user, item_ids=ITEMS[:9], at=NOW)
        assert cached.rank(ranked, NOW).scores == Recommender(bundle, store).rank(ranked, NOW).scores


@pytest.mark.parametrize("name", MODELS)
def test_one_more_event_is_appended_and_not_encoded_again(bundles, name, monkeypatch):
    store, cache = Store(), StateCache(StatesConfig(least_events=3))
    first, other, same = bundles[name]
    assert model_digest(first, "ranker") == model_digest(same, "ranker") != model_digest(other, "ranker")
    for number in range(9):
        store.add("a", number, worlds.START + number)
    encoded = []
    for bundle in (first, same):
        encode = bundle.ranker.encode
        monkeypatch.setattr(
            bundle.ranker, "encode", lambda history, encode=encode: encoded.append(1) or encode(history)
        )
    asked = RecommendRequest(user_id="a", k=3, at=NOW)
    recommender = Recommender(first, store, states=cache)
    for _ in range(3):
        recommender.recommend(asked, NOW)
    assert (len(encoded), cache.counts.hits, cache.counts.misses) == (1, 2, 1)
    for number in range(4):
        store.add("a", number, worlds.START + 20)
    recommender.recommend(asked, NOW)
    Recommender(same, store, states=cache).recommend(asked, NOW)  # the swap finds the state of the bundle before
    assert (len(encoded), cache.counts.updates, cache.counts.hits) == (1, 1, 3)
    short = RecommendRequest(history=[InlineEvent(item_id=ITEMS[0], timestamp=1)] * 5, k=3, at=NOW)
    recommender.recommend(short, NOW)
    assert (len(encoded), cache.counts.entries) == (
        2,
        3,
    )  # a state, and a vector of each retriever; what is sent along is nobody's, and not kept


@pytest.mark.parametrize("name", ["sdim, one basket", "dare, own counts"])
def test_a_bounded_store_makes_models_evict_and_not_encode(bundles, name):
    bundle, store, cache = bundles[name][0], Store(), StateCache(StatesConfig(least_events=2))
    recommender = Recommender(bundle, store, states=cache)
    for number in range(20):
        store.add("a", number, worlds.START + number)
        if number > 7:
            store.drop_oldest("a", 1)
        recommender.recommend(RecommendRequest(user_id="a", at=NOW), NOW)
    assert (cache.counts.misses, cache.counts.updates) == (1, 18)


def test_an_entry_larger_than_the_room_is_not_kept_and_bounds_are_checked(bundles):
    store, cache = Store(), StateCache(StatesConfig(bytes=40, least_events=0))
    store.add("a", 1, worlds.START)
    Recommender(bundles["dare"][0], store, states=cache).recommend(RecommendRequest(user_id="a", at=NOW), NOW)
    assert (cache.counts.entries, cache.counts.bytes, cache.counts.misses) == (0, 0, 1)
    with pytest.raises(ConfigError, match=r"\[recommender.states\] seconds is -1"):
        StatesConfig(seconds=-1)


def test_a_vector_is_made_again_only_for_another_history_or_retriever(bundles, monkeypatch):
    first, other, same = bundles["dare"]
    made = []
    for bundle in (first, other, same):
        vectors = bundle.retriever.user_vectors
        monkeypatch.setattr(
            bundle.retriever, "user_vectors", lambda history, vectors=vectors: made.append(1) or vectors(history)
        )
    store, cache = Store(), StateCache(StatesConfig(least_events=3))
    for number in range(9):
        store.add("a", number, worlds.START + number)
    counts = []
    for bundle in (first, first, other, same):  # `other` has the first's retriever
        Recommender(bundle, store, states=cache).recommend(RecommendRequest(user_id="a", at=NOW), NOW)
        counts.append(len(made))
    store.add("a", 9, worlds.START + 20)
    for _ in range(2):
        Recommender(first, store, states=cache).recommend(RecommendRequest(user_id="a", at=NOW), NOW)
    assert [*counts, len(made)] == [1, 1, 1, 2, 3]


def test_what_is_not_used_for_so_long_is_gone_and_what_is_used_stays():
    now = [0.0]
    cache = StateCache(StatesConfig(seconds=60.0), clock=lambda: now[0])
    entry = Entry(Seen(np.arange(3, dtype=np.int32), np.arange(3), np.zeros(3, np.uint8)), torch.zeros(1, 4))
    for user in ("a", "b"):
        cache.put(user, "model", entry)
    now[0] = 60.0
    assert cache.get("a", "model") is entry
    now[0] = 61.0
    assert cache.get("b", "model") is None
    assert (cache.counts.entries, cache.counts.bytes, cache.counts.evictions) == (1, entry.bytes, 1)
    assert cache.get("a", "model") is entry
    now[0] = 122.0
    assert cache.get("a", "model") is None
    assert (cache.counts.entries, cache.counts.bytes, cache.counts.evictions) == (0, 0, 2)


def test_what_is_too_much_pushes_out_the_least_lately_used():
    entry = Entry(Seen(np.arange(3, dtype=np.int32), np.arange(3), np.zeros(3, np.uint8)), torch.zeros(1, 4))
    cache = StateCache(StatesConfig(bytes=2 * entry.bytes))
    for user in "aba" + "c":
        cache.put(user, "model", entry)
    assert [user for user in "abc" if cache.get(user, "model")] == ["a", "c"]
    assert cache.counts.evictions == 1


def test_an_entry_owns_its_arrays(bundles):
    """A view of a mapped snapshot would keep all of its pages."""
    store, cache = Store(), StateCache(StatesConfig(least_events=1))
    for number in range(5):
        store.add("a", number, worlds.START + number)
    bundle, held = bundles["dare"][0], store.read("a")
    Recommender(bundle, Fixed(held), states=cache).recommend(RecommendRequest(user_id="a", at=NOW), NOW)
    for part in ("ranker", "retriever"):
        entry = cache.get("a", model_digest(bundle, part))
        assert entry.events.times.tolist() == held.time.tolist()
        for ours, mapped in ((entry.events.times, held.time), (entry.events.actions, held.action)):
            assert not np.shares_memory(ours, mapped)


class Fixed:
    """Gives one history, as a mapped snapshot does."""

    def __init__(self, events: Events) -> None:
        self.events = events

    def read(self, user_id: str) -> Events:
        return self.events
