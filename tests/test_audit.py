"""The audit: what `prepare` makes passes, whatever the log; and each planted leak fails its own check."""

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.append import append
from pipelines.audit import Audit, Check, audit, refuse_failed
from pipelines.audit_record import last_audit, text
from pipelines.buckets import user_hashes
from pipelines.candidates import fixed_candidates, history_rows, request_keys
from pipelines.datasets import RawLog
from pipelines.ingest import ingest
from pipelines.prepare import PrepareConfig, prepare
from pipelines.prepared import CandidateSets, PreparedSet, Requests, digest_of
from pipelines.samplers import SAMPLERS
from pipelines.splits import SplitConfig
from pipelines.transitions import block_edges, blocks, pair_words
from ranking.items import ItemTable, Transitions
from recsys.cli import main
from recsys.errors import DataError, GateError
from recsys.files import write_json
from recsys.history import DAY, Events, Histories

TOP = 10


@pytest.fixture(scope="module")
def by_time(log: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """Sixty real households, split by time."""
    config = PrepareConfig(
        workers=1, negatives=20, transitions_top_n=TOP, samplers=("uniform", "popularity", "never_so_far")
    )
    return prepare(log, tmp_path_factory.mktemp("audit") / "prepared", config)


@pytest.fixture(scope="module")
def by_user(log: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """The same households, each one's last requests; only twelve of either kept."""
    config = PrepareConfig(workers=1, negatives=20, split=SplitConfig("last_request"), max_eval_requests=12)
    return prepare(log, tmp_path_factory.mktemp("audit") / "prepared", config)


def failed(found: Audit) -> set[str]:
    return {check.name for check in found.failed}


def tampered(clean: PreparedSet, change: Callable[[PreparedSet], None], folder: Path, sign: bool = True) -> PreparedSet:
    """Return a changed copy, whose manifest vouches for the changed files."""
    shutil.copytree(clean.directory, folder / "prepared")
    change(PreparedSet(folder / "prepared"))
    done = PreparedSet(folder / "prepared")
    if sign:
        manifest = json.loads((done.directory / "manifest.json").read_text())
        (done.directory / "manifest.json").unlink()
        write_json(done.directory / "manifest.json", manifest | {"digest": digest_of(done.directory)})
    return done


# -- clean ------------------------------------------------------------------------------------------------------------


def test_what_prepare_makes_passes(by_time: PreparedSet, by_user: PreparedSet, log: Path) -> None:
    for clean in (by_time, by_user):
        found = audit(clean, [log])
        assert failed(found) == set()
        assert found.notes == ()
        assert len({check.name for check in found.checks}) == len(found.checks) == 19
        refuse_failed(found)


def random_events(seed: int, users: int, sessions: int, distinct: bool) -> pl.DataFrame:
    """Sessions that interleave, straddle the cuts and share moments; lines without session or action among them."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(sessions):
        user = draw.integers(users)
        session = [f"s{number}", f"s{number % 3}", None][draw.choice(3, p=[0.5, 0.2, 0.3])]
        start = draw.integers(90 * 2) * DAY // 2 + (number if distinct else 0)
        spread = 2 * DAY if session and draw.random() < 0.5 else 0
        for later in draw.integers(0, 7, draw.integers(1, 6)):
            action = ["buy", "view", None][draw.choice(3, p=[0.6, 0.3, 0.1])]
            value = [None, 1.0, 3.0, 5.0][draw.integers(4)]
            rows.append((f"u{user}", f"i{draw.integers(40)}", int(start + later * spread), action, session, value))
    schema = dict.fromkeys(["user_id", "item_id", "timestamp", "action", "session_id", "value"], pl.String)
    return pl.DataFrame(rows, schema=schema | {"timestamp": pl.Int64, "value": pl.Float64}, orient="row")


def random_set(events: pl.DataFrame, config: PrepareConfig, folder: Path) -> PreparedSet:
    ingest(RawLog("a log", events.lazy(), None), folder / "log")
    try:
        return prepare(folder / "log", folder / "prepared", config)
    except DataError as error:
        assume("no training request" not in str(error) and "does not occur" not in str(error))
        raise


@given(
    seed=st.integers(0, 2**32),
    users=st.integers(1, 8),
    sessions=st.integers(5, 80),
    kind=st.sampled_from(["time", "last_request"]),
    positive=st.sampled_from([(), ("buy",)]),
    least=st.sampled_from([None, 3.0]),
    named=st.booleans(),
    kept=st.sampled_from([None, 3]),
    top=st.sampled_from([0, 2]),
)
@settings(max_examples=40, deadline=None)
def test_any_log_prepared_passes(seed, users, sessions, kind, positive, least, named, kept, top) -> None:
    events = random_events(seed, users, sessions, distinct=kind == "last_request")
    config = PrepareConfig(
        split=SplitConfig(kind), positive=positive, min_value=least, workers=1, buckets=3, negatives=4,
        max_eval_requests=kept, transitions_top_n=top, samplers=("popularity", "never_so_far"),
    )  # fmt: skip
    with TemporaryDirectory() as name:
        done = random_set(events if named else events.drop("session_id"), config, Path(name))
        assert failed(audit(done, [Path(name) / "log"])) == set()
        if kept is None:
            alone = audit(done)
            assert failed(alone) == set()
            assert "no log was given" in alone.notes[0]


@pytest.mark.parametrize("kind", ["time", "last_request"])
def test_a_set_that_grew_passes_with_all_its_parts(tmp_path: Path, kind: str) -> None:
    events = random_events(3, 8, 200, distinct=True).sort("timestamp")
    cut = int(events["timestamp"].quantile(0.8) or 0)
    parts = [tmp_path / "log", tmp_path / "later"]
    for folder, some in zip(parts, (pl.col("timestamp") < cut, pl.col("timestamp") >= cut), strict=True):
        ingest(RawLog(folder.name, events.filter(some).lazy(), None), folder)
    config = PrepareConfig(split=SplitConfig(kind), workers=1, negatives=4)  # type: ignore[arg-type]
    first = prepare(parts[0], tmp_path / "first", config)
    grown = append(parts[1], first.directory, tmp_path / "grown")
    found = audit(grown, parts)
    assert (failed(found), found.notes, len(found.checks)) == (set(), (), 19)
    assert "not what this set was made from" in audit(grown, parts[:1]).notes[0]


def test_users_who_asked_to_be_forgotten_are_missed_only_until_the_set_is_prepared_anew(tmp_path: Path) -> None:
    ingest(RawLog("log", random_events(3, 8, 200, distinct=True).lazy(), None), tmp_path / "log")
    config = PrepareConfig(workers=1, negatives=4)
    before = prepare(tmp_path / "log", tmp_path / "before", config)
    write_json(tmp_path / "log" / "forgotten.json", ["u3"])
    assert "log_events" in failed(audit(before, [tmp_path / "log"]))
    after = prepare(tmp_path / "log", tmp_path / "after", config)
    assert "u3" not in after.users["user_id"]
    found = audit(after, [tmp_path / "log"])
    assert (failed(found), found.notes) == (set(), ())


def test_without_its_log_a_choice_of_last_requests_cannot_be_audited(by_user: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"keeps 12 of \d+ .* last_request; audit it together with the log"):
        audit(by_user)


def test_another_log_is_not_compared(by_time: PreparedSet, tmp_path: Path) -> None:
    ingest(RawLog("another", random_events(1, 3, 20, distinct=False).lazy(), None), tmp_path / "log")
    found = audit(by_time, [tmp_path / "log"])
    assert found.passed
    assert "not what this set was made from" in found.notes[0]
    assert not {"log_events", "log_requests"} & {check.name for check in found.checks}


# -- planted leaks ----------------------------------------------------------------------------------------------------


def save_requests(prepared: PreparedSet, split: str, requests: Requests) -> None:
    requests.save(prepared.directory / "requests" / f"{split}.safetensors")


def save_candidates(prepared: PreparedSet, name: str, sets: CandidateSets) -> None:
    sets.save(prepared.directory / "candidates" / f"{name}.safetensors")


def save_items(prepared: PreparedSet, **changes: torch.Tensor | Transitions) -> None:
    old = prepared.items
    parts = {"count": old.count, "transitions": old.transitions, "dense": old.dense} | changes
    count, transitions, dense = parts["count"], parts["transitions"], parts["dense"]
    assert isinstance(count, torch.Tensor)
    assert isinstance(dense, torch.Tensor)
    assert isinstance(transitions, Transitions)
    path = prepared.directory / "items.safetensors"
    table = ItemTable(old.columns, old.categorical, old.cardinality, count.clone(), transitions, dense)
    path.unlink()
    table.save(path)


def save_histories(prepared: PreparedSet, item: np.ndarray, time: np.ndarray) -> None:
    action, offsets = np.array(prepared.histories.events.action), np.array(prepared.histories.offsets)
    folder = prepared.directory / "histories"
    shutil.rmtree(folder)  # the old files are still mapped: never write into them
    folder.mkdir()
    Histories(Events(item, action, time), offsets).save(folder)


def together(one: Requests, other: Requests) -> Requests:
    """Return the requests of both, by (at, user)."""
    offsets = np.concatenate([one.offsets, other.offsets[1:] + one.offsets[-1]])
    columns = (np.concatenate([getattr(one, name), getattr(other, name)]) for name in ("user", "at", "end"))
    joined = Requests(*columns, offsets, np.concatenate([one.positive, other.positive]))
    return joined.take(np.lexsort((joined.user, joined.at)))


def with_positives(requests: Requests, positives: list[np.ndarray]) -> Requests:
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in positives])]).astype(np.int64)
    return replace(requests, offsets=offsets, positive=np.concatenate(positives).astype(np.int32))


def baskets(requests: Requests) -> list[np.ndarray]:
    return np.split(requests.positive, requests.offsets[1:-1])


def the_basket_at_hand_in_a_history(prepared: PreparedSet) -> None:
    test = prepared.requests("test")
    end = test.end.copy()
    end[7] += 1
    save_requests(prepared, "test", replace(test, end=end))


def an_event_short(prepared: PreparedSet) -> None:
    test = prepared.requests("test")
    one = int(np.argmax(test.end > prepared.histories.offsets[test.user]))
    end = test.end.copy()
    end[one] -= 1
    save_requests(prepared, "test", replace(test, end=end))


def events_out_of_order(prepared: PreparedSet) -> None:
    """The first line of a basket and an inner one of the next change places: where histories end, nothing changes."""
    time = np.array(prepared.histories.events.time)
    item = np.array(prepared.histories.events.item)
    train = prepared.requests("train")
    size = np.diff(train.offsets)
    for user in range(len(prepared.histories)):
        mine = np.flatnonzero(train.user == user)
        for one, other in pairwise(mine):
            if size[one] >= 2 and size[other] >= 3:
                first, inner = train.end[one], train.end[other] + 1
                time[[first, inner]], item[[first, inner]] = time[[inner, first]], item[[inner, first]]
                save_histories(prepared, item, time)
                return


def a_test_request_in_training(prepared: PreparedSet) -> None:
    train, test = prepared.requests("train"), prepared.requests("test")
    save_requests(prepared, "train", together(train, test.take(np.array([3]))))


def half_a_test_basket_in_training(prepared: PreparedSet) -> None:
    train, test = prepared.requests("train"), prepared.requests("test")
    one = test.take(np.array([int(np.argmax(np.diff(test.offsets) > 1))]))
    half = with_positives(one, [one.positive[: len(one.positive) // 2]])
    save_requests(prepared, "train", together(train, half))


def whole_baskets_once_more_in_training(prepared: PreparedSet) -> None:
    """A log read twice with another clock: every user's large test baskets stand in training too."""
    train, test = prepared.requests("train"), prepared.requests("test")
    mine = baskets(train)
    for user, basket in zip(test.user, baskets(test), strict=True):
        mine[int(np.argmax(train.user == user))] = basket
    save_requests(prepared, "train", with_positives(train, mine))


def later_cuts(prepared: PreparedSet) -> None:
    path = prepared.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cuts"]["valid"] += 7 * DAY
    write_json(path, manifest)


def whole_counts(prepared: PreparedSet) -> torch.Tensor:
    count = np.bincount(prepared.key_to_row[prepared.histories.events.item], minlength=len(prepared.items))
    return torch.from_numpy(count)


def counts_of_the_whole_log(prepared: PreparedSet) -> None:
    count = whole_counts(prepared)
    table = prepared.catalogue.with_columns(pl.Series("train_count", count[2:].numpy()))
    table.write_parquet(prepared.directory / "catalogue.parquet")
    save_items(prepared, count=count)


def one_event_too_many_in_the_catalogue(prepared: PreparedSet) -> None:
    table = prepared.catalogue.with_columns(pl.col("train_count") + (pl.col("item_key") == 5).cast(pl.Int64))
    table.write_parquet(prepared.directory / "catalogue.parquet")


def an_item_of_the_test_period_called_trained(prepared: PreparedSet) -> None:
    count = prepared.items.count.clone()
    count[int(torch.nonzero((count == 0) & (whole_counts(prepared) > 0))[0])] = 1
    save_items(prepared, count=count)


def transitions_of(prepared: PreparedSet, requests: Requests, top_n: int) -> Transitions:
    some = requests.take(np.argsort(requests.user, kind="stable"))
    with TemporaryDirectory() as name:
        file = Path(name) / "pairs.bin"
        pair_words(some.user, some.offsets, some.positive).tofile(file)
        edges = [block_edges([file], one, top_n) for one in blocks([file], len(prepared.items))]
    degree, target, weight = (
        np.concatenate([getattr(one, part) for one in edges]) for part in ("degree", "target", "weight")
    )
    offsets = np.concatenate([[0], np.cumsum(degree)])
    return Transitions(torch.from_numpy(offsets), torch.from_numpy(target), torch.from_numpy(weight))


def transitions_into_the_test_period(prepared: PreparedSet) -> None:
    both = together(prepared.requests("train"), prepared.requests("test"))
    save_items(prepared, transitions=transitions_of(prepared, both, TOP))


def another_threshold_of_transitions(prepared: PreparedSet) -> None:
    """One item keeps its eleventh heaviest transition in place of its tenth, both with their true weights."""
    every, kept = transitions_of(prepared, prepared.requests("train"), 0), prepared.items.transitions
    row = int(np.argmax((np.diff(kept.offsets) == TOP) & (np.diff(every.offsets) > TOP)))
    target, weight = kept.target.clone(), kept.weight.clone()
    mine = slice(int(kept.offsets[row]), int(kept.offsets[row + 1]))
    all_targets, all_weights = every.of(row)
    dropped = ~torch.isin(all_targets, target[mine])
    lightest = int(torch.argmin(weight[mine]))
    targets, weights = target[mine].clone(), weight[mine].clone()
    targets[lightest], weights[lightest] = all_targets[dropped][0], all_weights[dropped][0]
    order = torch.argsort(targets)
    target[mine], weight[mine] = targets[order], weights[order]
    save_items(prepared, transitions=Transitions(kept.offsets, target, weight))


def sampler_weights_of_the_whole_log(prepared: PreparedSet) -> None:
    old = prepared.items
    table = ItemTable(old.columns, old.categorical, old.cardinality, whole_counts(prepared))
    test, hashes = prepared.requests("test"), user_hashes(prepared.users["user_id"].to_list())
    look_up = history_rows(prepared.histories, prepared.key_to_row)
    drawn = fixed_candidates(test, request_keys(test, hashes), SAMPLERS["popularity"](table), 20, 0, look_up)
    save_candidates(prepared, "test_popularity", drawn)


def change_candidates(prepared: PreparedSet, change: Callable[[np.ndarray, np.ndarray, CandidateSets], None]) -> None:
    sets = prepared.candidates("valid", "uniform")
    item, label = sets.item.copy(), sets.label.copy()
    change(item, label, sets)
    save_candidates(prepared, "valid_uniform", CandidateSets(sets.offsets, item, label))


def a_positive_among_the_negatives(prepared: PreparedSet) -> None:
    def change(item: np.ndarray, label: np.ndarray, sets: CandidateSets) -> None:
        item[sets.offsets[5] - 1] = item[sets.offsets[4]]

    change_candidates(prepared, change)


def a_positive_last(prepared: PreparedSet) -> None:
    def change(item: np.ndarray, label: np.ndarray, sets: CandidateSets) -> None:
        first, last = sets.offsets[4], sets.offsets[5] - 1
        item[[first, last]], label[[first, last]] = item[[last, first]], label[[last, first]]

    change_candidates(prepared, change)


def a_negative_nobody_bought_in_training(prepared: PreparedSet) -> None:
    def change(item: np.ndarray, label: np.ndarray, sets: CandidateSets) -> None:
        positives = prepared.requests("valid").positive
        cold = np.flatnonzero(prepared.items.count.numpy()[2:] == 0) + 2
        item[sets.offsets[5] - 1] = np.setdiff1d(cold, positives)[0]

    change_candidates(prepared, change)


def lists_of_other_requests(prepared: PreparedSet) -> None:
    sets = prepared.candidates("valid", "uniform")
    save_candidates(prepared, "valid_uniform", sets.take(np.roll(np.arange(len(sets)), 1)))


def a_list_too_few(prepared: PreparedSet) -> None:
    sets = prepared.candidates("valid", "uniform")
    save_candidates(prepared, "valid_uniform", sets.take(np.arange(len(sets) - 1)))


def another_item_in_the_histories(prepared: PreparedSet) -> None:
    item = np.array(prepared.histories.events.item)
    item[-1] = (item[-1] + 1) % prepared.catalogue.height
    save_histories(prepared, item, np.array(prepared.histories.events.time))


def a_target_moved_before_its_request(prepared: PreparedSet) -> None:
    """The point-in-time rule holds for what is stored, but what is stored is not what happened."""
    test = prepared.requests("test")
    time, end = np.array(prepared.histories.events.time), test.end.copy()
    newest = {int(user): index for index, user in enumerate(test.user)}  # no later request sees the event
    one = newest[int(test.user[-1])]
    time[end[one]] = test.at[one] - 1
    end[one] += 1
    save_histories(prepared, np.array(prepared.histories.events.item), time)
    save_requests(prepared, "test", replace(test, end=end))


BY_TIME: list[tuple[Callable[[PreparedSet], None], set[str]]] = [
    (the_basket_at_hand_in_a_history, {"history_before_request"}),
    (an_event_short, {"history_whole"}),
    (events_out_of_order, {"history_in_order"}),
    (
        a_test_request_in_training,
        {"shared_requests", "shared_moments", "splits_in_period", "log_requests", "transitions"},
    ),
    (half_a_test_basket_in_training, {"shared_moments", "splits_in_period", "log_requests", "transitions"}),
    (whole_baskets_once_more_in_training, {"repeated_baskets", "log_requests", "transitions"}),
    (
        later_cuts,
        {"cuts", "splits_in_period", "log_requests", "training_counts", "trained_flags", "sampler_weights"},
    ),
    (counts_of_the_whole_log, {"training_counts", "trained_flags"}),
    (one_event_too_many_in_the_catalogue, {"training_counts"}),
    (an_item_of_the_test_period_called_trained, {"training_counts", "trained_flags"}),
    (transitions_into_the_test_period, {"transitions"}),
    (another_threshold_of_transitions, {"transitions"}),
    (sampler_weights_of_the_whole_log, {"sampler_weights", "negatives_trained"}),
    (a_positive_among_the_negatives, {"candidate_lists", "sampler_weights"}),
    (a_positive_last, {"candidate_lists", "sampler_weights"}),
    (a_negative_nobody_bought_in_training, {"sampler_weights", "negatives_trained"}),
    (lists_of_other_requests, {"candidate_lists", "sampler_weights"}),
    (a_list_too_few, {"candidate_lists", "sampler_weights"}),
    (another_item_in_the_histories, {"log_events"}),
    (a_target_moved_before_its_request, {"log_events"}),
]


@pytest.mark.parametrize(("leak", "caught"), BY_TIME, ids=[leak.__name__ for leak, _ in BY_TIME])
def test_a_planted_leak_fails_its_checks_and_no_other(
    by_time: PreparedSet, log: Path, tmp_path: Path, leak: Callable[[PreparedSet], None], caught: set[str]
) -> None:
    found = audit(tampered(by_time, leak, tmp_path), [log])
    assert failed(found) == caught
    with pytest.raises(GateError) as raised:
        refuse_failed(found)
    for name in caught:
        assert f"  {name}: " in str(raised.value)


def bought_in_test(prepared: PreparedSet) -> np.ndarray:
    bought = np.zeros(len(prepared.items), np.int64)
    bought[prepared.requests("test").positive] = 1
    return bought


def a_column_of_test_sales(prepared: PreparedSet) -> None:
    column = pl.Series("sales", bought_in_test(prepared)[2:])
    prepared.catalogue.with_columns(column).write_parquet(prepared.directory / "catalogue.parquet")


def a_word_for_test_sales(prepared: PreparedSet) -> None:
    column = pl.Series("season", np.array(["summer", "december"])[bought_in_test(prepared)[2:]])
    prepared.catalogue.with_columns(column).write_parquet(prepared.directory / "catalogue.parquet")


def a_dense_feature_of_test_sales(prepared: PreparedSet) -> None:
    low = torch.from_numpy(-bought_in_test(prepared)).float()  # the wrong way round is as telling
    save_items(prepared, dense=torch.stack([torch.arange(len(low)) % 7, low], 1))


def the_next_item_beside_each_user(prepared: PreparedSet) -> None:
    test = prepared.requests("test")
    next_item = [None] * prepared.users.height
    for user, basket in zip(test.user.tolist(), baskets(test), strict=True):
        next_item[user] = prepared.catalogue["item_id"][int(basket[0]) - 2]
    column = pl.Series("favourite", next_item, dtype=pl.String)
    prepared.users.with_columns(column).write_parquet(prepared.directory / "users.parquet")


def an_early_test_request_in_training(prepared: PreparedSet) -> None:
    """Of a user whose test request was not kept: only the log knows it."""
    train, test = prepared.requests("train"), prepared.requests("test")
    offsets, time = prepared.histories.offsets, prepared.histories.events.time
    user = int(np.setdiff1d(np.arange(len(prepared.histories)), test.user)[0])
    newest = int(time[offsets[user + 1] - 1])
    end = int(offsets[user] + np.searchsorted(time[offsets[user] : offsets[user + 1]], newest))
    basket = np.unique(prepared.histories.events.item[end : offsets[user + 1]].astype(np.int32) + 2)
    whole = lambda *values: np.array(values, np.int64)  # noqa: E731
    one = Requests(whole(user), whole(newest), whole(end), whole(0, len(basket)), basket)
    save_requests(prepared, "train", together(train, one))


BY_USER: list[tuple[Callable[[PreparedSet], None], set[str]]] = [
    (a_column_of_test_sales, {"item_features"}),
    (a_word_for_test_sales, {"item_features"}),
    (a_dense_feature_of_test_sales, {"item_features"}),
    (the_next_item_beside_each_user, {"user_features"}),
    (an_early_test_request_in_training, {"splits_in_period", "log_requests", "transitions"}),
    (counts_of_the_whole_log, {"training_counts", "trained_flags"}),
]


@pytest.mark.parametrize(("leak", "caught"), BY_USER, ids=[leak.__name__ for leak, _ in BY_USER])
def test_a_planted_leak_is_caught_under_last_request(
    by_user: PreparedSet, log: Path, tmp_path: Path, leak: Callable[[PreparedSet], None], caught: set[str]
) -> None:
    assert failed(audit(tampered(by_user, leak, tmp_path), [log])) == caught


@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_a_session_that_reaches_over_the_cut_does_not_train(seed: int) -> None:
    """Its first moment is a training moment, so only the log tells that it ends in the evaluated period."""
    events = random_events(seed, 4, 60, distinct=True)
    config = PrepareConfig(workers=1, negatives=2, samplers=("uniform",))

    def plant(prepared: PreparedSet) -> None:
        cut = prepared.manifest["cuts"]["valid"]
        names = dict(zip(prepared.catalogue["item_id"], prepared.key_to_row.tolist(), strict=True))
        rows = {user: row for row, user in enumerate(prepared.users["user_id"])}
        spans = events.filter(pl.col("session_id").is_not_null()).group_by("user_id", "session_id")
        spans = spans.agg(pl.col("timestamp").min().alias("at"), pl.col("timestamp").max().alias("last"), "item_id")
        over = spans.filter(pl.col("at") < cut, pl.col("last") >= cut).sort("at").rows(named=True)
        assume(over)
        row, at = rows[over[0]["user_id"]], over[0]["at"]
        mine = prepared.histories.of(row).time
        end = int(prepared.histories.offsets[row] + np.searchsorted(mine, at))
        basket = np.unique([names[item] for item in over[0]["item_id"]]).astype(np.int32)
        columns = (np.array([value], np.int64) for value in (row, at, end))
        one = Requests(*columns, np.array([0, len(basket)]), basket)
        save_requests(prepared, "train", together(prepared.requests("train"), one))

    with TemporaryDirectory() as name:
        clean = random_set(events, config, Path(name))
        found = failed(audit(tampered(clean, plant, Path(name) / "other"), [Path(name) / "log"]))
        assert "log_requests" in found
        assert found <= {"log_requests", "transitions"}


def test_files_changed_after_prepare_are_noticed(by_time: PreparedSet, log: Path, tmp_path: Path) -> None:
    def change(prepared: PreparedSet) -> None:
        prepared.users.with_columns(pl.lit(1).alias("new")).write_parquet(prepared.directory / "users.parquet")

    assert failed(audit(tampered(by_time, change, tmp_path, sign=False), [log])) == {"files_unchanged"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda requests: replace(requests, user=requests.user + 60),
            r"test.safetensors: request 0 has user row \d+; this set has rows 0..59",
        ),
        (lambda requests: replace(requests, end=requests.end - 10**6), r"has a history that ends at -?\d+; its user's"),
        (
            lambda requests: replace(requests, positive=requests.positive * 0),
            r"positive 0 is no item row; expected 2..",
        ),
        (lambda requests: replace(requests, offsets=requests.offsets[:-1]), r"of different lengths"),
    ],
)
def test_what_makes_no_sense_is_refused(by_time: PreparedSet, tmp_path: Path, change, message: str) -> None:
    def spoil(prepared: PreparedSet) -> None:
        save_requests(prepared, "test", change(prepared.requests("test")))

    with pytest.raises(DataError, match=message):
        audit(tampered(by_time, spoil, tmp_path))


# -- facts ------------------------------------------------------------------------------------------------------------


def test_filters_that_counted_the_whole_log_are_told(by_time: PreparedSet, log: Path, tmp_path: Path) -> None:
    """Telling is all: the filter came before any split."""
    shutil.copytree(log, tmp_path / "log")
    card = json.loads((log / "ingest.json").read_text())
    filtered = {"min_user_events = 3": 0, "min_item_events = 4": 17, "quantity above 0": 2}
    write_json(tmp_path / "log" / "ingest.json", card | {"filtered": filtered})
    events, cut = by_time.histories.events, by_time.manifest["cuts"]["valid"]
    ever, training = Counter(events.item.tolist()), Counter(events.item[events.time < cut].tolist())
    few_items = sum(training[key] < 4 for key in ever)
    few_users = sum((by_time.histories.of(row).time < cut).sum() < 3 for row in range(len(by_time.histories)))
    found = audit(by_time, [tmp_path / "log"])
    assert found.passed
    assert f"min_item_events = 4, counted over all its time, the test period included: {few_items:,} of its" in str(
        found.notes
    )
    assert f"min_user_events = 3, counted over all its time, the test period included: {few_users:,} of its 60" in str(
        found.notes
    )
    assert len(found.notes) == 2


def test_facts_equal_a_plain_count(by_time: PreparedSet, log: Path) -> None:
    found = audit(by_time, [log])
    events, count = by_time.histories.events, by_time.items.count.tolist()
    cut = by_time.manifest["cuts"]["valid"]
    assert [facts.split for facts in found.splits] == ["train", "valid", "test"]
    for facts in found.splits:
        requests = by_time.requests(facts.split)  # type: ignore[arg-type]
        inside = alone = 0
        for user, end, basket in zip(requests.user, requests.end, baskets(requests), strict=True):
            earlier = {int(key) + 2 for key in events.item[by_time.histories.offsets[user] : end]}
            inside += len(earlier & set(basket.tolist()))
            alone += not earlier
        cold = [row for row in requests.positive.tolist() if count[row] == 0]
        users = set(requests.user.tolist())
        assert (facts.requests, facts.users, facts.positives) == (len(requests), len(users), len(requests.positive))
        assert facts.sampled == len(requests)
        assert facts.positives_in_history == pytest.approx(inside / len(requests.positive))
        assert facts.without_history == alone
        assert facts.cold_users == sum(bool((by_time.histories.of(user).time >= cut).all()) for user in users)
        assert (facts.cold_positives, facts.cold_items) == (len(cold), len(set(cold)))
    assert [(one.split, one.sampler) for one in found.samplers] == [
        (split, name) for split in ("valid", "test") for name in ("uniform", "popularity", "never_so_far")
    ]
    for one in found.samplers:
        assert one.negatives_per_request == 20
        if one.sampler == "never_so_far":
            assert one.negatives_in_history == 0
        if one.sampler == "popularity":  # it takes away what popularity knows
            uniform = next(other for other in found.samplers if (other.split, other.sampler) == (one.split, "uniform"))
            assert one.popularity_auc is not None
            assert uniform.popularity_auc is not None
            assert one.popularity_auc < uniform.popularity_auc


# -- saying it --------------------------------------------------------------------------------------------------------


def test_an_audit_is_kept_and_read_back(by_time: PreparedSet, log: Path, tmp_path: Path) -> None:
    found = audit(by_time, [log])
    assert last_audit(tmp_path / "audit.json") is None
    found.save(tmp_path / "audit.json")
    assert last_audit(tmp_path / "audit.json") == found
    again = audit(PreparedSet(by_time.directory), [log])
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "audit.json").read_bytes()
    (tmp_path / "audit.json").write_text('{"format": 1, "checks": 3}')
    with pytest.raises(DataError, match=r"audit.json: "):
        last_audit(tmp_path / "audit.json")


def test_the_text_names_every_check_failed_ones_first() -> None:
    checks = (Check("one", True, "all 1,000", "all"), Check("two", False, "3 of 7", "none"))
    found = Audit("d", checks, notes=("A note.",))
    lines = text(found).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["two", "FAILED"], ["one", "passed"]]
    assert lines[-1] == "The audit of this data failed 1 of 2 checks: two."
    assert "A note." in lines
    assert text(Audit("d", checks[:1])).endswith("The audit of this data passed: 1 check, no leak found.")


def test_the_command_says_the_verdict_and_exits_with_it(
    by_time: PreparedSet,
    log: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recsys", "audit", "-w", str(tmp_path), *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    code, out, err = run()
    assert (code, out) == (3, "")
    assert "recsys prepare --workspace" in err
    shutil.copytree(log, tmp_path / "log")
    shutil.copytree(by_time.directory, tmp_path / "prepared")
    code, out, _ = run()
    assert code == 0
    assert out.rstrip().endswith("no leak found.")
    assert last_audit(tmp_path / "audit.json") == audit(by_time, [log])
    the_basket_at_hand_in_a_history(PreparedSet(tmp_path / "prepared"))
    code, out, err = run("--json")
    assert code == 4
    assert "history_before_request: events at or after their moment are seen by 1 of" in err
    table = json.loads(out)
    assert table == json.loads((tmp_path / "audit.json").read_text())
    assert table["passed"] is False
    wrong = {check["name"] for check in table["checks"] if not check["passed"]}
    assert wrong == {"files_unchanged", "history_before_request"}
