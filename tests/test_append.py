"""A log prepared part by part is, byte for byte, the log prepared at once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import Line, logs, raw, synthetic
from typer.testing import CliRunner

from pipelines import growth, spans
from pipelines import waiting as waits
from pipelines.append import add_part, append, changed_words
from pipelines.datasets import RawLog
from pipelines.growth import PairRuns
from pipelines.ingest import ingest
from pipelines.late import LATE
from pipelines.mapping import SessionsConfig
from pipelines.merging import _inserted
from pipelines.parts import keep_part, open_part
from pipelines.prepare import PrepareConfig, prepare
from pipelines.prepared import PreparedSet, Requests, contents
from pipelines.quickstart import Job, QuickstartConfig
from pipelines.splits import SplitConfig
from pipelines.transitions import pair_words
from pipelines.waiting import Users, Waiting
from pipelines.workspace import Workspace
from recsys.cli import app
from recsys.errors import ConfigError, DataError
from recsys.history import DAY
from recsys.progress import Progress, silent

configs = st.builds(
    PrepareConfig,
    split=st.builds(
        SplitConfig,
        kind=st.sampled_from(["time", "last_request"]),
        valid_days=st.sampled_from([0.5, 14]),
        test_days=st.sampled_from([0.5, 20]),
    ),
    positive=st.sampled_from([(), ("buy",)]),
    transitions_top_n=st.sampled_from([0, 1, 3]),
    max_eval_requests=st.sampled_from([None, 4]),
    negatives=st.just(3),
    samplers=st.just(("uniform", "never_so_far")),
    workers=st.just(1),
)


def divided(lines: list[Line], at: list[float], whose: int) -> list[list[Line]]:
    """Divide a log at shares of its span; each user's cuts are moved by up to `whose` days, so that parts overlap."""
    first, last = min(line.time for line in lines), max(line.time for line in lines)
    cuts = [first + int(share * (last - first + 1)) for share in sorted(at)]
    late = {user: sum(user.encode()) % (whose + 1) * DAY for user in {line.user for line in lines}}
    number = [sum(line.time + late[line.user] >= cut for cut in cuts) for line in lines]
    parts = [[line for line, part in zip(lines, number, strict=True) if part == index] for index in range(len(at) + 1)]
    return [part for part in parts if part]


def ingested(parts: list[list[Line]], folder: Path, sessions: list[bool]) -> list[Path]:
    """Ingest the parts; every other one has no catalogue, the rest have one that says something new."""
    paths = []
    for index, (lines, named) in enumerate(zip(parts, sessions, strict=False)):
        log = raw(lines, f"part {index}", named)
        assert log.items is not None
        items = log.items.with_columns(
            pl.when(pl.col("item_id") == f"i{3 + index}")
            .then(pl.lit(f"c{index}"))
            .otherwise("category")
            .alias("category"),
            weight=pl.lit(index + 0.5),
            tags=pl.when(pl.col("item_id") != f"i{4 + index}").then(pl.concat_list(pl.lit(f"t{index}"), "category")),
        )
        paths.append(folder / f"part{index}")
        ingest(replace(log, items=None if index % 2 else items), paths[-1])
    return paths


def same_bytes(one: PreparedSet, other: PreparedSet) -> None:
    names = [str(path.relative_to(one.directory)) for path in contents(one.directory)]
    assert names == [str(path.relative_to(other.directory)) for path in contents(other.directory)]
    for name in (*names, "manifest.json"):
        assert (one.directory / name).read_bytes() == (other.directory / name).read_bytes(), name
    assert one.digest == other.digest
    for mine, its in zip(waiting(one), waiting(other), strict=True):
        assert mine.tolist() == its.tolist()


def waiting(prepared: PreparedSet) -> list[np.ndarray]:
    """Return the arrays of all requests that wait, by user."""
    users = Users(prepared.users["user_key"].to_numpy().astype(np.int64), prepared.histories.offsets[:-1])
    found = Waiting.open(prepared.directory / "growth")
    heads = found.heads(users)
    return list(vars(found.take(heads, heads.by_user(np.arange(len(heads))), users)).values())


@given(
    lines=logs(),
    more=logs(),
    config=configs,
    at=st.lists(st.floats(0.3, 1), min_size=1, max_size=3),
    whose=st.sampled_from([0, 9]),
    sessions=st.lists(st.booleans(), min_size=5, max_size=5),
)
@settings(max_examples=20, deadline=None)
def test_part_by_part_is_all_at_once(
    lines: list[Line], more: list[Line], config: PrepareConfig, at: list[float], whose: int, sessions: list[bool]
) -> None:
    parts = divided([*lines, *more, *synthetic(60)], at, whose)
    with TemporaryDirectory() as name:
        folder = Path(name)
        paths = ingested(parts, folder, sessions)
        try:
            grown = prepare(paths[0], folder / "grown", config)
        except DataError as error:  # too short a first part to train on
            assert "no training request" in str(error) or "does not occur" in str(error)  # noqa: PT017
            return
        for index in range(1, len(paths)):
            before = dict(grown.catalogue.select("item_id", "item_key").iter_rows())
            grown = append(paths[index], grown.directory, folder / "grown")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(spans, "EVENTS_PER_DIVISION", 60)
                patch.setattr(spans, "ROWS_AT_ONCE", 50)
                whole = prepare(paths[: index + 1], folder / "whole", replace(config, buckets=3))
            same_bytes(grown, whole)
            after = dict(grown.catalogue.select("item_id", "item_key").iter_rows())
            assert {item: after[item] for item in before} == before


def test_many_days_end_in_a_new_base_and_leave_the_sets_before_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(growth, "RUNS", 3)
    monkeypatch.setattr(waits, "RUNS", 3)
    monkeypatch.setattr(waits, "WRITTEN_AT_ONCE", 7)
    lines = synthetic(4000)
    paths = ingested(divided(lines, list(np.linspace(0.7, 0.99, 7)), 0), tmp_path, [True] * 8)
    config = PrepareConfig(transitions_top_n=4, max_eval_requests=50, workers=1)
    sets = [prepare(paths[0], tmp_path / "set0", config)]
    pairs, runs = [], []
    for index in range(1, len(paths)):
        sets.append(append(paths[index], sets[-1].directory, tmp_path / f"set{index}"))
        pairs.append(len(list((sets[-1].directory / "growth" / "pairs").glob("*-added.bin"))))
        runs.append(sorted(run.name for run in (sets[-1].directory / "growth" / "pending").iterdir()))
    assert [len(some) for some in runs] == [2, 3, 1, 2, 3, 1, 2]
    assert runs[1] == ["0000", "0001", "0002"]
    assert pairs == [1, 1, 0, 1, 1, 0, 1]
    again = append(paths[2], sets[1].directory, tmp_path / "again")  # its files were linked to, and merged since
    same_bytes(again, sets[2])
    same_bytes(sets[-1], prepare(paths, tmp_path / "whole", config))


@given(seed=st.integers(0, 2**32), appends=st.integers(1, 13))
@settings(max_examples=30, deadline=None)
def test_few_runs_hold_the_words_of_many_appends(seed: int, appends: int) -> None:
    draw = np.random.default_rng(seed)
    rows, words, gone = 5, [], []

    def some(count: int) -> np.ndarray:
        pair = draw.integers(0, rows, count).astype(np.uint64) << np.uint64(40) | draw.integers(0, 9, count).astype(
            "u8"
        )
        return np.sort(pair)

    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth, "RUNS", 12)
        (Path(name) / "0").mkdir()
        words += (base := some(30)).tolist()
        for low, high in ((0, 2), (2, rows)):
            base[(base >> np.uint64(40) >= low) & (base >> np.uint64(40) < high)].tofile(
                Path(name) / "0" / f"base-{low:08}.bin"
            )
        runs = PairRuns.open(Path(name) / "0")
        for number in range(1, appends + 1):
            (folder := Path(name) / str(number)).mkdir()
            taken = draw.permutation(len(words))[: draw.integers(0, 4)]
            removed = np.sort(np.array([words[place] for place in taken], np.uint64))
            added = some(int(draw.integers(0, 9)))
            runs = runs.grown(folder, added, removed, rows)
            words = [word for place, word in enumerate(words) if place not in set(taken.tolist())] + added.tolist()
            assert len(runs.added) == len(runs.removed) == bin(number % 12).count("1")
        plus = [word for low, _ in runs.ranges(rows) for word in runs.base(low).tolist()]
        plus += [word for file in runs.added for word in np.fromfile(file, np.uint64).tolist()]
        gone = [word for file in runs.removed for word in np.fromfile(file, np.uint64).tolist()]
        assert sorted(plus) == sorted([*words, *gone])
        for file in (*runs.added, *runs.removed):
            assert (np.diff(np.fromfile(file, np.int64)) >= 0).all()


def test_a_day_is_laid_into_a_log_as_numpy_would() -> None:
    """Runs of new values behind ascending places, at both ends and twice in one place too."""
    draw = np.random.default_rng(7)
    for old, new in ((0, 0), (0, 3), (9, 0), (9, 1), (40, 25)):
        values, more = draw.integers(0, 99, old), draw.integers(0, 99, new)
        behind = np.sort(draw.integers(0, old + 1, new))
        assert _inserted(values, behind, more).tolist() == np.insert(values, behind, more).tolist()


def chain(draw: np.random.Generator, count: int) -> Requests:
    """Requests by (user, at) with baskets of distinct rows."""
    user, at = np.sort(draw.integers(0, 4, count)), draw.integers(0, 6, count)
    at = at[np.lexsort((at, user))]
    size = draw.integers(1, 4, count)
    positive = np.concatenate([np.sort(draw.choice(9, n, replace=False)) for n in size]) if count else np.empty(0)
    return Requests(user, at, at, np.concatenate([[0], np.cumsum(size)]), positive.astype(np.int32))


@given(seed=st.integers(0, 2**32), old=st.integers(0, 20), new=st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_words_added_and_removed_turn_the_old_chain_into_the_new(seed: int, old: int, new: int) -> None:
    draw = np.random.default_rng(seed)
    before, trained = chain(draw, old), chain(draw, new)
    added, removed = changed_words(before.take(np.lexsort((before.user, before.at))), trained)
    assert (np.diff(added.astype(np.int64)) >= 0).all()
    both_user, both_at = np.append(before.user, trained.user), np.append(before.at, trained.at)
    both = Requests(
        both_user,
        both_at,
        both_at,
        np.append(before.offsets, trained.offsets[1:] + before.offsets[-1]),
        np.append(before.positive, trained.positive),
    ).take(np.lexsort((both_at, both_user)))
    whole = pair_words(both.user, both.offsets, both.positive)
    kept = pair_words(before.user, before.offsets, before.positive)
    assert sorted([*kept.tolist(), *added.tolist()]) == sorted([*whole.tolist(), *removed.tolist()])


def test_what_cannot_be_appended_is_said_and_changes_nothing(tmp_path: Path) -> None:
    lines = synthetic(3000)
    early, late = divided(lines, [0.95], 0)
    (first, second) = ingested([early, late], tmp_path, [True, True])
    done = prepare(first, tmp_path / "set", PrepareConfig(workers=1))
    ingest(raw([*late, early[-1]]), tmp_path / "overlap")
    with pytest.raises(
        DataError,
        match=r"overlap/events.parquet: user 'u\d+' has an event at 1970-\d\d-\d\d [\d:]+, not after the user's newest "
        r"event 1970-\d\d-\d\d [\d:]+ of the parts before \(1 such users\); .*\[source\] events takes a glob",
    ):
        append(tmp_path / "overlap", done.directory, done.directory)
    with pytest.raises(DataError, match=r"overlap/events.parquet: user"):
        prepare([first, tmp_path / "overlap"], tmp_path / "other", PrepareConfig(workers=1))
    with pytest.raises(DataError, match=r"part0: is part of .*set already"):
        append(first, done.directory, done.directory)
    bare = prepare(first, tmp_path / "bare", PrepareConfig(workers=1, appendable=False))
    assert bare.digest == done.digest
    with pytest.raises(DataError, match=r"bare: nothing was kept to append to \(appendable = false\)"):
        append(second, bare.directory, bare.directory)
    assert PreparedSet(done.directory).digest == done.digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "overlap", "part0", "part1", "set"]


def test_a_part_is_kept_and_appended_once_and_a_refused_one_not_at_all(tmp_path: Path) -> None:
    lines = synthetic(3000)
    (first, second) = ingested(divided(lines, [0.95], 0), tmp_path, [True, True])
    ingest(raw(lines[:5]), tmp_path / "late")
    later, done = tmp_path / "later", prepare(first, tmp_path / "set", PrepareConfig(workers=1))
    for _ in range(2):
        parts = [first, *sorted(later.glob("*"))]
        done = add_part(second, parts, later, done.directory)
        assert [path.name for path in later.iterdir()] == ["0001"]
        assert [part["name"] for part in done.manifest["parts"]] == ["part 0", "part 1"]
        with pytest.raises(DataError, match=r"late/events.parquet: user .* not after the user's newest"):
            add_part(tmp_path / "late", [first, *sorted(later.glob("*"))], later, done.directory)
    assert done.digest == prepare([first, later / "0001"], tmp_path / "whole", PrepareConfig(workers=1)).digest


def test_a_part_takes_the_number_after_the_highest_and_never_the_place_of_another(tmp_path: Path, monkeypatch) -> None:
    days = divided(synthetic(3000), [0.2, 0.4, 0.6], 0)
    parts, later = ingested(days, tmp_path, [True] * len(days)), tmp_path / "later"
    assert [keep_part(part, later).name for part in parts[:3]] == ["0001", "0002", "0003"]
    rmtree(later / "0001")
    monkeypatch.setattr("pipelines.parts.shutil.copytree", lambda *_, **__: copytree(parts[0], later / "0004"))
    with pytest.raises(DataError, match="0004: written by another process meanwhile"):
        keep_part(parts[3], later)
    monkeypatch.undo()
    assert keep_part(parts[3], later).name == "0005"
    digests = [open_part(path).record.digest for path in sorted(later.iterdir())]
    assert digests == [open_part(parts[number]).record.digest for number in (1, 2, 0, 3)]


def test_the_command_line_adds_a_day_and_prepares_all_days_anew(tmp_path: Path) -> None:
    (first, second) = ingested(divided(synthetic(3000), [0.95], 0), tmp_path, [True, True])
    place = Workspace(tmp_path / "workspace")
    copytree(first, place.log)
    options = ["prepare", "--workspace", str(place.root)]
    for verb in (options, [*options, "--add", str(second)]):
        assert CliRunner().invoke(app, verb, catch_exceptions=False).exit_code == 0
    grown = place.prepared.digest
    assert [part.name for part in place.parts] == ["log", "0001"]
    written = [path for path in place.prepared.directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o644}
    with pytest.raises(ConfigError, match=r"--add goes on with the settings of the prepared set"):
        CliRunner().invoke(app, [*options, "--add", str(second), "--set", "negatives=3"], catch_exceptions=False)
    assert CliRunner().invoke(app, options, catch_exceptions=False).exit_code == 0
    assert Workspace(place.root).prepared.digest == grown


def test_late_events_can_be_left_out_of_a_part(tmp_path: Path) -> None:
    early, later = divided(synthetic(3000), [0.95], 0)
    (first, second) = ingested([early, later], tmp_path, [True, True])
    newest = {line.user: line.time for line in sorted(early, key=lambda line: line.time)}
    late = [line for line in early if line.time < newest[line.user]][:7]
    log = raw([*later, *late], "part 1")
    ingest(
        replace(log, items=pl.scan_parquet(second / "items.parquet"), sessions=SessionsConfig("1h")), tmp_path / "day"
    )
    place = Workspace(tmp_path / "workspace")
    copytree(first, place.log)
    options = ["prepare", "--workspace", str(place.root)]
    assert CliRunner().invoke(app, options, catch_exceptions=False).exit_code == 0
    add = [*options, "--add", str(tmp_path / "day"), "--late", "leave-out"]
    done = CliRunner().invoke(app, add, catch_exceptions=False)
    assert f"{tmp_path / 'day'}: 7 late events were left out." in done.stderr
    (kept,) = place.later_parts.iterdir()
    card = json.loads((kept / "ingest.json").read_text())
    assert (card["read"], card["filtered"], card["sessions"]) == (len(later) + 7, {LATE: 7}, {"gap": "1h"})
    assert pl.read_parquet(kept / "events.parquet").equals(pl.read_parquet(second / "events.parquet"))
    rmtree(place.prepared.directory)  # as if interrupted: the part is kept, the set is as it was
    prepare(place.log, place.prepared.directory, PrepareConfig())
    assert CliRunner().invoke(app, add, catch_exceptions=False).exit_code == 0
    assert list(place.later_parts.iterdir()) == [kept]
    with pytest.raises(DataError, match=r"day/events.parquet: all \d+ events are late, .* was this part added already"):
        CliRunner().invoke(app, add, catch_exceptions=False)
    with pytest.raises(ConfigError, match="--late leave-out: expected --add DIR with it"):
        CliRunner().invoke(app, [*options, "--late", "leave-out"], catch_exceptions=False)


class Quiet:
    """A terminal that remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, sentence: str) -> None:
        self.said.append(sentence)

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        yield silent


def test_the_quickstart_goes_on_with_the_grown_set_and_never_drops_a_later_part(tmp_path: Path) -> None:
    (first, second) = ingested(divided(synthetic(3000), [0.95], 0), tmp_path, [True, True])
    place, ui = Workspace(tmp_path / "workspace"), Quiet()
    copytree(first, place.log)

    def prepared(config: PrepareConfig) -> tuple[str, int]:
        Job(place, QuickstartConfig(("popularity",), "popularity", prepare=config), ui, "")._prepare()
        found = Workspace(place.root).prepared
        return found.digest, len(found.manifest["parts"])

    plain = PrepareConfig()
    small, parts = prepared(plain)
    assert (parts, prepared(plain)) == (1, (small, 1))
    grown = add_part(second, place.parts, place.later_parts, place.prepared.directory).digest
    assert prepared(plain) == (grown, 2)
    assert ui.said[-1].endswith("The log has 1 later part. Already done.")
    other = prepare(place.parts, tmp_path / "other", PrepareConfig(negatives=3))
    assert prepared(PrepareConfig(negatives=3)) == (other.digest, 2)
    prepare(place.log, place.prepared.directory)  # as if the addition had stopped half-way
    assert prepared(plain) == (grown, 2)
    assert ui.said[-1].endswith("The addition of one was interrupted: all parts are prepared anew.")


def test_train_and_evaluate_say_that_an_addition_was_interrupted_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, second) = ingested(divided(synthetic(3000), [0.95], 0), tmp_path, [True, True])
    place = Workspace(tmp_path / "workspace")
    copytree(first, place.log)
    options = ["--workspace", str(place.root)]
    train, evaluate = ["train", "--config", "popularity", *options], ["evaluate", "popularity", *options]

    def said(arguments: list[str]) -> str:
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stderr

    said(["prepare", *options, "--set", "negatives=3"])
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.append.append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            add_part(second, place.parts, place.later_parts, place.prepared.directory)
    words = f"prepared lacks {place.root / 'later' / '0001'}: an addition was interrupted"
    go_on = f"recsys prepare {' '.join(options)} --add {place.root / 'later' / '0001'}"
    for verb in (train, evaluate):
        assert words in (found := said(verb))
        assert f"`{go_on}` appends what is missing" in found
    said(go_on.split()[1:])
    assert len(Workspace(place.root).prepared.manifest["parts"]) == 2
    assert "lacks" not in said([*train, "--name", "again"])


def interrupted(*_: object) -> PreparedSet:
    raise KeyboardInterrupt


def test_only_values_of_the_minimum_are_positives(tmp_path: Path) -> None:
    lines = synthetic(2000)
    log = raw(lines)
    value = pl.Series("value", np.random.default_rng(3).integers(0, 6, len(lines)).astype(float))
    value = value.scatter([0, 1], [None, float("nan")])
    ingest(RawLog("rated", log.events.with_columns(value), log.items), tmp_path / "rated")
    ingest(
        RawLog("chosen", log.events.with_columns(value).filter(pl.col("value").fill_nan(None) >= 4), log.items),
        tmp_path / "few",
    )
    rated = prepare(tmp_path / "rated", tmp_path / "set", PrepareConfig(workers=1, min_value=4))
    few = prepare(tmp_path / "few", tmp_path / "fewer", PrepareConfig(workers=1))

    def targets(done: PreparedSet) -> set[tuple[str, str]]:
        found, users, ids = done.requests("train"), done.users["user_id"], done.catalogue["item_id"]
        owner = np.repeat(found.user, np.diff(found.offsets))
        return {(users[int(user)], ids[int(row) - 2]) for user, row in zip(owner, found.positive, strict=True)}

    assert len(rated.histories.events) == 2000  # histories keep every event
    assert targets(rated) == targets(few) != set()
    ingest(log, tmp_path / "plain")
    with pytest.raises(DataError, match=r"min_value is 4, but there is no column 'value'; it has user_id"):
        prepare(tmp_path / "plain", tmp_path / "set", PrepareConfig(workers=1, min_value=4))


def test_items_that_no_catalogue_has_are_marked_appended_or_anew(tmp_path: Path) -> None:
    lines = synthetic(2000)
    first, later = map(raw, divided(lines, [0.5], 0))
    assert first.items is not None
    assert later.items is not None

    def unlisted(*logs: RawLog) -> set[str]:
        places = [tmp_path / f"part {number}" for number in range(len(logs))]
        for log, place in zip(logs, places, strict=True):
            ingest(log, place)
        config = PrepareConfig(workers=1, negatives=5)
        anew = prepare(places, tmp_path / "anew", config)
        grown = prepare(places[0], tmp_path / "grown", config)
        for place in places[1:]:
            grown = append(place, grown.directory, tmp_path / "grown")
        assert grown.digest == anew.digest
        marks = anew.items.unlisted.numpy()[2:]
        return set(anew.catalogue.filter(pl.Series(marks))["item_id"])

    known = {f"i{n}" for n in range(3, 12)}
    every = {line.item for line in lines}
    half = first.items.head(4)
    assert unlisted(replace(first, items=None), replace(later, items=None)) == set()  # no catalogue at all
    assert unlisted(first, replace(later, items=None)) == every - known
    assert unlisted(replace(first, items=None), later) == every - known
    assert unlisted(replace(first, items=half), later) == every - known
    assert unlisted(first, replace(later, items=half)) == every - known  # what a later part leaves out stays


def test_what_left_the_catalogue_is_in_none_though_the_numbers_go_on(tmp_path: Path) -> None:
    log = raw(synthetic(2000))
    assert log.items is not None
    ingest(log, tmp_path / "log")
    before = prepare(tmp_path / "log", tmp_path / "before", PrepareConfig(workers=1, negatives=5))
    ingest(replace(log, items=log.items.head(4)), tmp_path / "log")
    after = prepare(
        tmp_path / "log", tmp_path / "after", PrepareConfig(workers=1, negatives=5), previous=before.directory
    )
    assert after.items.unlisted.sum() == before.items.unlisted.sum() + log.items.collect().height - 4


def test_numbers_of_the_catalogue_reach_the_item_table(tmp_path: Path) -> None:
    log = raw(synthetic(2000))
    assert log.items is not None
    items = log.items.with_columns(
        price=pl.Series([1.5, None, float("nan"), float("inf"), *range(5)]), stock=pl.Series(range(9)), new=pl.lit(True)
    )
    ingest(replace(log, items=items), tmp_path / "source")
    done = prepare(tmp_path / "source", tmp_path / "set", PrepareConfig(workers=1))
    assert done.manifest["numeric"] == ["price", "stock"]
    assert done.manifest["categorical"] == ["category", "new"]
    row = {item: key + 2 for item, key in done.catalogue.select("item_id", "item_key").iter_rows()}
    wanted = dict.fromkeys(row, (0.0, 0.0)) | {
        f"i{3 + n}": (price, float(n)) for n, price in enumerate([1.5, 0, 0, 0, 0, 1, 2, 3, 4])
    }
    assert {item: tuple(done.items.dense[place].tolist()) for item, place in row.items()} == wanted
    assert done.items.dense[:2].tolist() == [[0, 0], [0, 0]]
    without = {item for item, place in row.items() if done.items.missing[place, 0]}
    assert without == set(row) - {"i3", *(f"i{n}" for n in range(7, 12))}  # and what the catalogue does not have
    chosen = prepare(
        tmp_path / "source", tmp_path / "set", PrepareConfig(workers=1, columns=("stock",), numeric=("new",))
    )
    assert (chosen.items.columns, chosen.manifest["numeric"]) == (("stock",), ["new"])
    with pytest.raises(DataError, match=r"column 'category' is String; expected numbers"):
        prepare(tmp_path / "source", tmp_path / "set", PrepareConfig(workers=1, numeric=("category",)))
