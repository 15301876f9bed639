"""Filters, rules and availability: no filtered item is ever given, and a shortfall means there is no further item."""

import json
import os
from collections import Counter
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import worlds
from ranking.attributes import Attributes
from ranking.availability import AvailabilityFile
from ranking.batch import FIRST_ITEM
from ranking.bundle import Bundle, Contents, write_bundle
from ranking.bundle_models import NamedModel
from ranking.filters import Filters, Unavailable, seen_rows
from ranking.items import ItemTable
from ranking.models import RANKERS
from ranking.recommender import Recommender
from ranking.recommender_config import Cap, RecommenderConfig, load_recommender
from ranking.users import User
from recsys.errors import ConfigError, DataError, RequestError
from recsys.history import Events
from recsys.messages import InlineEvent, ItemFilter, RecommendRequest

WORLD = worlds.make_world(users=40, length=20, known=50, repeats=0.2)
COUNT = len(WORLD.key_to_row)
ITEMS = [f"item-{key}" for key in range(COUNT)]
DAY = worlds.DAY
NOW = worlds.START + 21 * DAY
CATEGORY = WORLD.items.column("category")[FIRST_ITEM:].numpy() - 2  # of item key
BRAND = np.arange(COUNT) % 7 - 1  # -1 is missing
PRICE = np.where(np.arange(COUNT) % 9 == 4, np.nan, np.arange(COUNT) * 13 % 50).astype(np.float32)  # NaN is missing


class Store:
    def read(self, user_id):
        return WORLD.histories.of(int(user_id)) if user_id.isdigit() else None


class Table:
    """What cannot be had, changed by hand."""

    def __init__(self):
        self.now = Unavailable(0, frozenset())

    def set(self, items):
        self.now = Unavailable(self.now.version + 1, frozenset(items))

    def unavailable(self):
        return self.now


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """DARE behind MQSA-TED, over items with a category, and a brand and a price that may be missing."""
    old = WORLD.items
    codes = np.concatenate([old.categorical.numpy(), np.concatenate([[0, 1], BRAND + 2])[:, None]], axis=1)
    items = ItemTable(
        ["category", "brand"],
        torch.from_numpy(codes.astype(np.int32)),
        [old.codes("category"), 8],
        old.count,
        old.transitions,
        torch.from_numpy(np.concatenate([[0, 0], np.nan_to_num(PRICE)]).astype(np.float32))[:, None],
        ["price"],
        missing=torch.from_numpy(np.isnan(np.concatenate([[0, 0], PRICE])))[:, None],
    )

    def named(name, **config):
        config_class, model_class = RANKERS[name]
        torch.manual_seed(1)
        return NamedModel(name, config_class(**config), model_class(config_class(**config), items))

    directory = tmp_path_factory.mktemp("bundle") / "bundle"
    vocabulary = {"category": [f"c{n}" for n in range(6)], "brand": [f"b{n}" for n in range(6)]}
    ranker, retriever = named("dare", window=12, retrieved=12), named("mqsa_ted", width=8, window=10)
    contents = Contents(
        items, ["", "", *ITEMS], ["", "", *ITEMS], WORLD.key_to_row, vocabulary, ["", "buy", "view"], ranker, retriever
    )
    write_bundle(directory, contents, worlds.PROVENANCE)
    return Bundle.load(directory)


def test_a_filter_of_what_no_item_has_is_told(bundle, caplog):
    filters = (
        ItemFilter("category", deny=("C0", "c1")),
        ItemFilter("item_id", deny=(ITEMS[0], "itm-1")),
        ItemFilter("price", at_least=3),
    )
    Filters(Attributes(bundle), len(bundle.items), filters)
    assert "the filter of category denies what no item has: 'C0' (but 'c0')" in caplog.text
    assert "the filter of item_id denies what no item has: 'itm-1' (but 'item-1')" in caplog.text
    assert "'c1'" not in caplog.text
    assert "price" not in caplog.text
    gone = tuple(f"gone-{number}" for number in range(1_000))
    assert Attributes(bundle).unknown("item_id", gone)[-1] == "995 more"


def test_what_is_in_no_catalogue_is_left_out_where_asked_unless_most_is(bundle, caplog):
    def given_where(unlisted, **config):
        marks = torch.zeros(len(bundle.items), dtype=torch.bool)
        marks[[ITEMS.index(item) + FIRST_ITEM for item in unlisted]] = True
        items = copy(bundle.items)
        items._buffers = {**items._buffers, "unlisted": marks}
        recommender = Recommender(replace(bundle, items=items), Store(), RecommenderConfig(**config))
        answer = recommender.recommend(RecommendRequest(user_id="3", k=COUNT, at=NOW, explain=True), NOW)
        return {item.item_id for item in answer.items}, answer.explanation.dropped_counts

    wanted = {"in_catalogue_only": True}
    every, reasons = given_where([], **wanted)
    assert "not in the catalogue" not in reasons
    gone = sorted(every)[:5]
    left, reasons = given_where(gone, **wanted)
    assert left == every - set(gone)
    assert reasons["not in the catalogue"] > 0
    assert "items are in no catalogue and left out" in caplog.text
    assert given_where(gone)[0] == every
    assert "too many" not in caplog.text
    assert given_where(ITEMS[: COUNT - 3], **wanted)[0] == every
    assert "items are in no catalogue, too many to leave them out" in caplog.text


def test_a_request_is_told_which_values_of_its_filters_no_item_has(bundle):
    recommender = Recommender(bundle, Store(), RecommenderConfig(filters=(ItemFilter("brand", deny=("B0",)),)))

    def warnings(*filters):
        answer = recommender.recommend(RecommendRequest(user_id="3", k=5, at=NOW, filters=filters), NOW)
        assert answer.warnings == recommender.warnings(filters)
        assert ("warnings" in answer.model_dump(mode="json")) is bool(answer.warnings)
        return answer.warnings

    assert warnings() == []  # what the config has is for the operator
    assert warnings(ItemFilter("brand", allow=("b0",)), ItemFilter("price", at_most=9)) == []
    wrong = ItemFilter("brand", allow=("B1", "b2"), deny=("b33",))
    assert warnings(ItemFilter("category", deny=("c1",)), wrong) == [
        "filters[1] of brand allows what no item has: 'B1' (but 'b1')",
        "filters[1] of brand denies what no item has: 'b33' (but 'b3')",
    ]
    long = "x" * 100_000
    assert len(warnings(ItemFilter("item_id", deny=(long, *(f"gone {n}" for n in range(9)))))[0]) < 300
    attributes = Attributes(bundle)
    assert attributes.unknown("item_id", ("ITEM-1", "itm-1"), 10) == ["'ITEM-1' (but 'item-1')", "'itm-1'"]


VALUES = st.lists(st.sampled_from([f"b{n}" for n in range(6)] + ["no such brand"]), max_size=5).map(tuple)
FILTERS = st.one_of(
    st.builds(ItemFilter, st.just("brand"), allow=VALUES),
    st.builds(ItemFilter, st.just("brand"), deny=VALUES),
    st.builds(ItemFilter, st.just("category"), deny=st.lists(st.sampled_from(["c0", "c1", "c2"])).map(tuple)),
    st.builds(ItemFilter, st.just("item_id"), deny=st.lists(st.sampled_from(ITEMS), max_size=30).map(tuple)),
    st.builds(ItemFilter, st.just("price"), at_least=st.integers(0, 40), at_most=st.integers(10, 50)),
)


def passes(one, key):
    """Whether an item passes a filter, by the filter's definition."""
    if one.column == "price":
        return (one.at_least is None or PRICE[key] >= one.at_least) and (
            one.at_most is None or PRICE[key] <= one.at_most
        )
    values = {
        "brand": [f"b{BRAND[key]}"] if BRAND[key] >= 0 else [],
        "category": [f"c{CATEGORY[key]}"],
        "item_id": [ITEMS[key]],
    }[one.column]
    if one.allow is not None and not set(values) & set(one.allow):
        return False
    return one.deny is None or not set(values) & set(one.deny)


def test_a_bundle_that_keeps_no_missing_numbers_is_read_as_before(tmp_path):
    table = ItemTable([], torch.zeros(4, 0).int(), [], torch.ones(4).long(), None, torch.zeros(4, 1), ["price"])
    kept = ItemTable(
        [], torch.zeros(4, 0).int(), [], table.count, None, table.dense, ["price"], missing=torch.eye(4)[:, 3:].bool()
    )
    for one, within in ((table, [2, 3]), (kept, [2])):
        one.save(tmp_path / "items.safetensors")
        assert ("missing" in one.tensors()) is (one is kept)  # so that other catalogues keep their bytes
        read = ItemTable.load(tmp_path / "items.safetensors")
        assert read.dense.tolist() == [[0.0]] * 4
        found = Attributes(SimpleNamespace(items=read)).between("price", None, 5)
        assert np.flatnonzero(found).tolist() == within


def keys(answer):
    return [int(item.item_id.split("-")[1]) for item in answer.items]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_no_filtered_item_is_given_and_a_shortfall_means_there_is_no_other(bundle, data):
    table = Table()
    config = RecommenderConfig(
        retrieval=data.draw(st.integers(0, 5)),
        repeats=data.draw(st.integers(0, 5)),
        transitions=3,
        popularity=2,
        exclude_seen_days=data.draw(st.sampled_from([0, 3.5])),
        filters=tuple(data.draw(st.lists(FILTERS, max_size=2))),
    )
    recommender = Recommender(bundle, Store(), config, table)
    for _ in range(2):  # the second request meets the masks of the first
        user, k = data.draw(st.integers(-1, 39)), data.draw(st.integers(1, 30))
        filters = data.draw(st.lists(FILTERS, max_size=2))
        gone = data.draw(st.sets(st.sampled_from([*ITEMS, "unknown"]), max_size=20))
        table.set(gone)
        days = data.draw(st.sampled_from([None, 0, 2, 5.5]))
        asked = RecommendRequest(
            user_id=str(user),
            k=k,
            at=NOW,
            filters=filters,
            exclude_seen=data.draw(st.booleans()),
            exclude_seen_days=days,
            explain=data.draw(st.booleans()),
        )
        answer = recommender.recommend(asked, NOW)
        seen = set()
        if user >= 0:
            events = WORLD.histories.of(user)
            window = config.exclude_seen_days if days is None else days
            since = -(2**62) if asked.exclude_seen else NOW - int(window * DAY) if window else NOW
            seen = {int(key) for key, time in zip(events.item, events.time, strict=True) if since <= time < NOW}
        fine = [
            key
            for key in range(COUNT)
            if key not in seen
            and ITEMS[key] not in gone
            and all(passes(one, key) for one in [*config.filters, *filters])
        ]
        given_ = keys(answer)
        assert len(set(given_)) == len(given_)
        assert set(given_) <= set(fine)
        assert len(given_) == min(k, len(fine))
        assert answer.shortfall == k - len(given_)
        if asked.explain:
            listed = {entry.item_id: entry for entry in answer.explanation.dropped}
            assert not set(listed) & {item.item_id for item in answer.items}
            assert all((ITEMS.index(i) in fine) == (entry.stage != "filter") for i, entry in listed.items())
            assert sum(answer.explanation.dropped_counts.values()) >= len(listed)


@pytest.mark.parametrize(
    ("config", "asked", "everything", "seen"),
    [
        (0, None, False, []),
        (2, None, False, [3, 4]),  # the first moment of the window belongs to it
        (2, 1, False, [4]),
        (0, 3, False, [2, 3, 4]),
        (2, 0, False, []),
        (2, 1, True, [2, 3, 4]),
    ],
)
def test_what_was_seen_within_so_many_days(config, asked, everything, seen):
    times = np.array([NOW - 2 * DAY - 1, NOW - 2 * DAY, NOW - 1, NOW - 1])
    rows = np.array([2, 3, 4, 4], np.int32)
    user = User(Events(rows.astype(np.uint32), np.zeros(4, np.uint8), times), rows, NOW, "a")
    request = RecommendRequest(user_id="a", exclude_seen_days=asked, exclude_seen=everything)
    assert seen_rows(request, user, config).tolist() == seen


@pytest.mark.parametrize(
    ("config", "asked", "options", "seen"),
    [
        ((), None, {"exclude_seen": True}, {1, 2, 3}),
        (("buy",), None, {"exclude_seen": True}, {1, 3}),
        (("buy",), None, {}, set()),
        (("buy",), None, {"exclude_seen_days": 1}, {3}),
        (("buy",), ["view"], {"exclude_seen": True}, {2, 3}),
        (("buy",), ["view", "buy"], {"exclude_seen_days": 1}, {2, 3}),
        (("buy",), [], {"exclude_seen": True}, {1, 2, 3}),
    ],
)
def test_only_events_of_some_actions_count_as_seen(bundle, config, asked, options, seen):
    days = {(1, "buy"): 3, (2, "view"): 0.5, (3, "buy"): 0.4, (3, "view"): 0.3}
    history = [
        InlineEvent(item_id=ITEMS[item], timestamp=NOW - int(ago * DAY), action=action)
        for (item, action), ago in days.items()
    ]
    recommender = Recommender(bundle, Store(), RecommenderConfig(exclude_seen_actions=config))
    request = RecommendRequest(history=history, k=COUNT, at=NOW, exclude_seen_actions=asked, **options)
    assert set(range(COUNT)) - set(keys(recommender.recommend(request, NOW))) == seen


def test_an_action_to_leave_out_that_the_bundle_does_not_know_is_refused(bundle):
    told = "exclude_seen_actions: no action 'Buy' in the bundle; there are 'buy', 'view'"
    with pytest.raises(ConfigError, match=told):
        Recommender(bundle, Store(), RecommenderConfig(exclude_seen_actions=("view", "Buy")))
    asked = RecommendRequest(user_id="3", exclude_seen=True, exclude_seen_actions=["Buy"])
    with pytest.raises(RequestError, match=told) as error:
        Recommender(bundle, Store()).recommend(asked, NOW)
    assert (error.value.status, error.value.code) == (422, "unknown_action")


def most_with_one_cap(fine, values, at_most):
    """How many items one cap lets through: per value at most so many, items without a value all."""
    counts = Counter(values[key] for key in fine)
    return sum(count if value < 0 else min(count, at_most) for value, count in counts.items())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_caps_hold_and_answers_fill_up_as_far_as_they_let(bundle, data):
    caps = tuple(
        data.draw(
            st.lists(
                st.builds(Cap, st.sampled_from(["brand", "category"]), st.integers(1, 4)),
                min_size=1,
                max_size=2,
                unique_by=lambda cap: cap.column,
            )
        )
    )
    config = RecommenderConfig(retrieval=3, repeats=3, transitions=2, popularity=2, rules=caps)
    k, user = data.draw(st.integers(1, 40)), data.draw(st.integers(-1, 39))
    filters = data.draw(st.lists(FILTERS, max_size=1))
    asked = RecommendRequest(user_id=str(user), k=k, at=NOW, filters=filters, explain=True)
    answer = Recommender(bundle, Store(), config).recommend(asked, NOW)
    fine = [key for key in range(COUNT) if all(passes(one, key) for one in filters)]
    values = {"brand": BRAND, "category": CATEGORY}
    taken = {cap: Counter(int(values[cap.column][key]) for key in keys(answer)) for cap in caps}
    for cap, counts in taken.items():
        assert all(count <= cap.at_most for value, count in counts.items() if value >= 0)
    if len(caps) == 1:
        assert len(answer.items) == min(k, most_with_one_cap(fine, values[caps[0].column], caps[0].at_most))
    elif answer.shortfall:  # nothing that is left would fit
        for key in set(fine) - set(keys(answer)):
            assert any(taken[cap][int(values[cap.column][key])] >= cap.at_most for cap in caps)
    scores = [item.score for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert all("at most" in entry.reason for entry in answer.explanation.dropped if entry.stage == "rules")


def test_what_a_full_cap_held_back_is_given_once_better_items_freed_its_place(tmp_path):
    """O1 and O2, scored in the second round, fill `kind` p and push A out; E, of A's colour, has its place then."""
    names = ["A", "F1", "F2", "F3", "O1", "O2", "E"]
    codes = {"colour": [0, 1, 1, 1, 2, 3, 0], "kind": [0, 1, 2, 3, 0, 0, 4]}
    table = np.concatenate([np.arange(2)[:, None] * [1, 1], np.array([*codes.values()]).T + 2]).astype(np.int32)
    count = torch.tensor([0, 0, 100, 90, 80, 70, 5, 4, 1])
    items = ItemTable([*codes], torch.from_numpy(table), [6, 7], count)
    config_class, model_class = RANKERS["personal_frequency"]
    ranker = NamedModel("personal_frequency", config_class(), model_class(config_class(), items))
    vocabulary = {"colour": [*"wxyz"], "kind": [*"pqrst"]}
    ids, keys = ["", "", *names], np.arange(FIRST_ITEM, len(names) + FIRST_ITEM, dtype=np.int32)
    contents = Contents(items, ids, ids, keys, vocabulary, [""], ranker)
    write_bundle(tmp_path / "bundle", contents, worlds.PROVENANCE)
    history = [InlineEvent(item_id=name, timestamp=at) for at, name in enumerate(("O1", "O2"))]
    for popularity in (4, 7):  # in two rounds, in one
        sources = {"retrieval": 0, "repeats": 0, "transitions": 0, "new_items": 0, "popularity": popularity}
        config = RecommenderConfig(**sources, rules=(Cap("colour", 1), Cap("kind", 2)))
        recommender = Recommender(Bundle.load(tmp_path / "bundle"), Store(), config)
        answer = recommender.recommend(RecommendRequest(history=history, k=4, at=10), 10)
        assert [item.item_id for item in answer.items] == ["O1", "O2", "F1", "E"]
        assert answer.shortfall == 0


def test_an_explanation_tells_every_stage_and_changes_nothing(bundle):
    config = RecommenderConfig(filters=(ItemFilter("brand", deny=("b0",)),), rules=(Cap("category", 2),))
    recommender = Recommender(bundle, Store(), config)
    asked = RecommendRequest(user_id="3", k=8, at=NOW, exclude_seen=True)
    plain = recommender.recommend(asked, NOW)
    told = recommender.recommend(asked.model_copy(update={"explain": True}), NOW)
    assert plain.explanation is None
    assert [item.stages for item in plain.items] == [None] * 8
    assert [(i.item_id, i.score, i.sources) for i in plain.items] == [
        (i.item_id, i.score, i.sources) for i in told.items
    ]
    for place, item in enumerate(told.items, 1):
        *sources, score, rules = item.stages
        assert [stage.stage for stage in sources] == item.sources
        assert all(stage.rank >= 1 and np.isfinite(stage.score) for stage in item.stages)
        assert (score.stage, score.score, rules.stage, rules.rank) == ("score", item.score, "rules", place)
        assert score.rank >= rules.rank
    reasons = told.explanation.dropped_counts
    assert set(reasons) >= {"seen", "filter of brand", "scored below the answer"}
    assert any(reason.startswith("at most 2 with category 'c") for reason in reasons)
    assert told.explanation.candidates + reasons["seen"] + reasons["filter of brand"] >= len(told.items)


def test_availability_changes_whole_and_every_reader_follows(tmp_path, bundle, caplog):
    path = tmp_path / "state" / "availability.json"
    table, other = AvailabilityFile(path), AvailabilityFile(path)
    recommender = Recommender(bundle, Store(), availability=other)
    asked = RecommendRequest(user_id="3", k=1, at=NOW)
    best = recommender.recommend(asked, NOW).items[0].item_id
    assert table.put({best: False, "not known yet": False}) == 2
    assert recommender.recommend(asked, NOW).items[0].item_id != best
    version = other.unavailable().version
    assert other.unavailable().version == version
    path.write_text("{")  # torn, as a writer that does not rename may leave it
    assert best in other.unavailable().item_ids
    assert "not valid JSON" in caplog.text
    with pytest.raises(DataError, match="not valid JSON"):
        table.put({best: True})
    with pytest.raises(DataError, match="not valid JSON"):
        AvailabilityFile(path)
    path.write_text(json.dumps({"unavailable": ["x"]}))
    os.utime(path, ns=(1, 1))
    assert other.unavailable().item_ids == {"x"}
    assert table.put({"x": True}) == 0
    assert recommender.recommend(asked, NOW).items[0].item_id == best
    path.unlink()
    assert other.unavailable().item_ids == frozenset()
    path.write_text('["x"]')
    with pytest.raises(DataError, match=r'not a table of unavailable items; expected \{"unavailable"'):
        AvailabilityFile(path)


def test_settings_come_from_toml_and_are_strict(tmp_path, bundle):
    path = tmp_path / "recommender.toml"
    path.write_text(
        '[recommender]\nrepeats = 7\nexclude_seen_days = 1.5\nexclude_seen_actions = ["buy"]\n'
        '[[filters]]\ncolumn = "brand"\ndeny = ["b1"]\n[[filters]]\ncolumn = "price"\nat_most = 9\n'
        '[[rules]]\ncolumn = "category"\nat_most = 2\n'
    )
    assert load_recommender(path, ["recommender.popularity=3"]) == RecommenderConfig(
        repeats=7,
        popularity=3,
        exclude_seen_days=1.5,
        exclude_seen_actions=("buy",),
        filters=(ItemFilter("brand", deny=("b1",)), ItemFilter("price", at_most=9)),
        rules=(Cap("category", 2),),
    )
    for text, message in (
        ("[recommender]\nrepeat = 1\n", r"unknown key 'repeat'; did you mean 'repeats'"),
        ('[[filters]]\ncolumn = "brand"\n', "neither values and numbers; expected allow or deny"),
        ('[[filters]]\ncolumn = "brand"\nallow = []\nat_most = 2\n', "both values and numbers"),
        ('[[filters]]\ncolumn = "brand"\nallowed = []\n', "allowed"),
        ('[[rules]]\ncolumn = "brand"\nat_most = 0\n', "at_most is 0; expected at least 1"),
        ("[recommender]\nfilters = []\n", r"write \[\[filters\]\]"),
        ("[serving]\n", "unknown key 'serving'"),
        ("[recommender]\nexclude_seen_days = inf\n", "exclude_seen_days is inf; expected at most 36500"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_recommender(path)
    for config, message in (
        (
            RecommenderConfig(rules=(Cap("brands", 1),)),
            "no item column of values 'brands'; there are item_id, category",
        ),
        (RecommenderConfig(filters=(ItemFilter("price", allow=("1",)),)), "at_least and at_most"),
        (
            RecommenderConfig(filters=(ItemFilter("brand", at_most=1),)),
            "no item column of numbers 'brand'.*allow and deny",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            Recommender(bundle, Store(), config)


def test_a_request_with_a_filter_of_an_unknown_column_is_refused(bundle):
    asked = RecommendRequest(
        history=[InlineEvent(item_id=ITEMS[0], timestamp=1)], filters=[ItemFilter("colour", allow=("red",))]
    )
    with pytest.raises(RequestError, match=r"filters\[0\]: no item column of values 'colour'") as error:
        Recommender(bundle, Store()).recommend(asked, NOW)
    assert (error.value.status, error.value.code) == (422, "unknown_column")
