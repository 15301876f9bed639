"""The live histories: snapshot plus everything the log holds, in order of time, whoever wrote it and whatever died."""

import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.history import UNKNOWN_KEY, Events
from recsys.stores import Encoder, Event, LogMark
from serving import history_store, view
from serving.event_log import SegmentLog
from serving.history_store import LmdbHistoryStore
from serving.view import MAX_USER_BYTES
from serving.view_files import remove_unused

USERS = ["a", "a\0", "a\0\0\0\0\0", "ä", "b" * MAX_USER_BYTES]  # keys of one must never be taken for another's


class Base:
    """A snapshot held in memory."""

    def __init__(self, histories: dict[str, Events] | None = None) -> None:
        self.histories = histories or {}
        self.id = "base"

    def read(self, user_id: str) -> Events | None:
        return self.histories.get(user_id)

    def users(self, limit: int) -> list[str]:
        return list(self.histories)[:limit]

    def mark(self, log: str) -> LogMark:
        return LogMark(log)


def events(times: list[int], first_item: int = 0) -> Events:
    """Return events at these times, items numbered from `first_item` in the order given, so that each is its own."""
    items = np.arange(first_item, first_item + len(times), dtype=np.uint32)
    return Events(items, (items % 3).astype(np.uint8), np.array(times, np.int64))


def rows(found: Events | None) -> list[tuple[int, int, int]]:
    assert found is not None
    return list(zip(found.time.tolist(), found.item.tolist(), found.action.tolist(), strict=True))


KEYS = Encoder(key_of=lambda item: int(item) if int(item) < 900 else UNKNOWN_KEY, action_of=len)
MORE_KEYS = Encoder(key_of=int, action_of=len)


def posted(number: int, user: str = "u", time: int | None = None) -> Event:
    return Event(f"id {number}", user, str(number), number if time is None else time, "x" * (number % 3))


TIMES = st.lists(st.integers(-5, 20), max_size=9)


@settings(max_examples=150, deadline=None)
@given(
    base=st.dictionaries(st.sampled_from(USERS), TIMES.map(sorted)),
    appends=st.lists(st.tuples(st.sampled_from(USERS), TIMES), max_size=8),
    chunk=st.sampled_from([1, 2, 5, 256]),
)
def test_a_history_is_snapshot_and_appended_events_in_order_of_time(base, appends, chunk):
    """Against a stable sort by time; equal times keep the order of arrival, the snapshot's first."""
    expected = {user: rows(events(times)) for user, times in base.items()}
    snapshot = Base({user: events(times) for user, times in base.items()})
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patched:
        patched.setattr(history_store, "CHUNK_EVENTS", chunk)
        store = LmdbHistoryStore(Path(directory) / "view", snapshot, map_bytes=2**24)
        for number, (user, times) in enumerate(appends):
            new = events(times, 100 * (number + 1))
            store.append(user, new)
            if times or user in expected:
                expected[user] = sorted(expected.get(user, []) + rows(new), key=lambda row: row[0])
            for other in USERS:
                found = store.read(other)
                assert (None if found is None else rows(found)) == expected.get(other)
        assert sorted(store.users(10)) == sorted(expected)
        assert set(store.users(2)) <= set(expected)
        assert len(store.users(2)) == min(2, len(expected))
        store.close()


def test_while_unknown_items_are_learned_others_post_and_read(tmp_path):
    """The log is read before anything is locked, and what was posted meanwhile is not lost."""
    log = SegmentLog(tmp_path / "log", "os")
    store = LmdbHistoryStore(tmp_path / "view", Base(), map_bytes=2**24)
    log.append([Event("", user, "950", time) for time, user in enumerate("abab")])
    store.follow(log, KEYS)
    replay, meanwhile = log.replay, []

    def slowly(start=0):
        for record in replay(start):
            yield record
            if not meanwhile:
                meanwhile.append("this")
                log.append([Event("", user, "950", 9) for user in "ac"])
                log.forget("b")
                store.follow(log, KEYS)
                assert store.read("a").time.tolist() == [0, 2, 9]

    log.replay = slowly
    store.learn(log, MORE_KEYS)
    assert rows(store.read("a")) == [(0, 950, 0), (2, 950, 0), (9, 950, 0)]
    assert (store.read("b"), rows(store.read("c"))) == (None, [(9, UNKNOWN_KEY, 0)])
    assert (store.position, store.unknown_events) == (log.end, 1)  # what came meanwhile is another process's to learn
    store.close()


@settings(max_examples=100, deadline=None)
@given(appends=st.lists(TIMES, max_size=8), bound=st.integers(1, 12), chunk=st.sampled_from([1, 2, 5, 256]))
def test_above_the_bound_the_oldest_go_and_nothing_else(appends, bound, chunk):
    with pytest.MonkeyPatch.context() as patched, tempfile.TemporaryDirectory() as name:
        patched.setattr(history_store, "CHUNK_EVENTS", chunk)
        log = SegmentLog(Path(name) / "log", "os")
        store = LmdbHistoryStore(Path(name) / "view", Base(), bound)
        expected: list[tuple[int, int]] = []
        for times in appends:
            numbers = range(890 + log.end, 890 + log.end + len(times))  # most of them unknown
            log.append([posted(n, time=time) for n, time in zip(numbers, times, strict=True)])
            store.follow(log, KEYS)
            new = [(t, n if n < 900 else UNKNOWN_KEY) for n, t in zip(numbers, times, strict=True)]
            expected = sorted(expected + sorted(new, key=lambda e: e[0]), key=lambda e: e[0])[-bound:]
            found = store.read("u")
            assert expected == ([] if found is None else list(zip(found.time, found.item, strict=True)))
            assert store.unknown_events == sum(item == UNKNOWN_KEY for _, item in expected)
        store.close()


def test_a_new_view_takes_up_where_its_snapshot_ends_and_adds_what_the_snapshot_left_out(tmp_path):
    log, other = SegmentLog(tmp_path / "log", "os"), SegmentLog(tmp_path / "other", "os")
    for some in (log, other):
        some.append([posted(number) for number in range(6)])
    ends = [0, *(record.end for record in log.replay())]
    base = Base({"u": events([0, 2, 3])})
    base.mark = lambda name: LogMark(name, ends[4], (ends[1],)) if name == log.id else LogMark(name)
    store = LmdbHistoryStore(tmp_path / "view", base)
    store.follow(log, KEYS)
    assert store.read("u").time.tolist() == [0, 1, 2, 3, 4, 5]
    assert store.position == log.end
    log.append([posted(6)])
    store.follow(log, KEYS)
    assert store.read("u").time.tolist() == [0, 1, 2, 3, 4, 5, 6]
    store.rebuild(log, KEYS)
    assert store.read("u").time.tolist() == [0, 1, 2, 3, 4, 5, 6]
    store.follow(other, KEYS)  # another state directory: nothing of its log is in the snapshot
    assert store.read("u").time.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty page"])
def test_a_damaged_view_is_begun_anew_with_a_message(tmp_path, caplog, damage, check):
    log = SegmentLog(tmp_path / "log", "os")
    log.append([posted(number) for number in range(3_000)])
    store = LmdbHistoryStore(tmp_path / "view", Base(), map_bytes=2**26)
    store.follow(log, KEYS)
    expected = rows(store.read("u"))
    store.close()
    path = tmp_path / "view" / "data.mdb"
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data[:] = b"garbage!" * (len(data) // 8)
    elif damage == "truncated":
        del data[len(data) // 2 :]
    elif check:
        data[8192:] = bytes(len(data) - 8192)  # only a process that reads it can tell, and may die of it
    path.write_bytes(data)
    store = LmdbHistoryStore(tmp_path / "view", Base(), check=check, map_bytes=2**26)
    store.follow(log, KEYS)
    assert rows(store.read("u")) == expected
    assert ("rebuilt from snapshot and log" in caplog.text) == (check or damage != "empty page")
    store.close()


def test_views_of_earlier_snapshots_go_once_nobody_uses_them(tmp_path):
    used, unused, kept = (LmdbHistoryStore(tmp_path / name, Base(), map_bytes=2**26) for name in "abc")
    unused.close()
    remove_unused(tmp_path, "c")
    assert sorted(path.parent.name for path in tmp_path.glob("*/data.mdb")) == ["a", "c"]
    used.close()
    kept.close()


def test_following_applies_each_event_once_also_those_of_a_writer_that_died_before_it_could(tmp_path):
    log = SegmentLog(tmp_path / "log", "os", segment_bytes=100)
    log.append([posted(1), posted(950, "v")])
    store = LmdbHistoryStore(tmp_path / "view", Base())
    assert [store.follow(log, KEYS), store.follow(log, KEYS)] == [2, 0]
    other = SegmentLog(tmp_path / "log", "os")
    other.append([posted(3)])  # and dies here
    log.append([posted(2, time=4), posted(1)])  # the second is a repeat
    assert store.follow(log, KEYS) == 2
    assert rows(store.read("u")) == [(1, 1, 1), (3, 3, 0), (4, 2, 2)]
    assert rows(store.read("v")) == [(950, UNKNOWN_KEY, 2)]
    assert store.read("w") is None
    assert store.position == log.end


def test_a_view_survives_a_restart_and_goes_on_where_it_was(tmp_path):
    log = SegmentLog(tmp_path / "log", "os")
    store = LmdbHistoryStore(tmp_path / "view", Base())
    log.append([posted(1)])
    store.follow(log, KEYS)
    store.close()
    log.append([posted(2)])
    store = LmdbHistoryStore(tmp_path / "view", Base())
    assert rows(store.read("u")) == [(1, 1, 1)]
    assert store.follow(log, KEYS) == 1
    assert rows(store.read("u")) == [(1, 1, 1), (2, 2, 2)]


def test_rebuilding_with_a_larger_catalogue_gives_unknown_items_their_keys(tmp_path):
    log = SegmentLog(tmp_path / "log", "os")
    log.append([posted(number) for number in (950, 1, 951)])
    store = LmdbHistoryStore(tmp_path / "view", Base())
    store.follow(log, KEYS)
    assert [item for _, item, _ in rows(store.read("u"))] == [1, UNKNOWN_KEY, UNKNOWN_KEY]
    assert store.unknown_events == 2
    assert store.rebuild(log, MORE_KEYS) == 3
    assert [item for _, item, _ in rows(store.read("u"))] == [1, 950, 951]
    assert store.unknown_events == 0
    assert store.follow(log, MORE_KEYS) == 0


def test_a_rebuilt_view_equals_the_one_that_followed_and_memory_is_bounded_by_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "APPLY_EVENTS", 7)
    log = SegmentLog(tmp_path / "log", "os", segment_bytes=500)
    followed, rebuilt = (LmdbHistoryStore(tmp_path / name, Base(), map_bytes=2**26) for name in ("one", "two"))
    draws = np.random.default_rng(0)
    for number in range(60):
        log.append([posted(10 * number + i, f"u{draws.integers(3)}", int(draws.integers(100))) for i in range(3)])
        followed.follow(log, KEYS)
    rebuilt.rebuild(log, KEYS)
    for user in ("u0", "u1", "u2"):
        assert rows(followed.read(user)) == rows(rebuilt.read(user))
    assert sum(len(rebuilt.read(user)) for user in rebuilt.users(9)) == 180


def test_a_view_ahead_of_its_log_starts_again(tmp_path):
    """The log was taken away: what the view holds is of another log."""
    log = SegmentLog(tmp_path / "log", "os")
    log.append([posted(1), posted(2)])
    store = LmdbHistoryStore(tmp_path / "view", Base())
    store.follow(log, KEYS)
    fresh = SegmentLog(tmp_path / "another log", "os")
    fresh.append([posted(3)])
    store.follow(fresh, KEYS)
    assert rows(store.read("u")) == [(3, 3, 0)]


def test_a_process_that_lags_behind_another_does_not_throw_the_view_away(tmp_path):
    """Its log object ends before the view does, until it looks again."""
    lagging = SegmentLog(tmp_path / "log", "os")
    log = SegmentLog(tmp_path / "log", "os")
    log.append([posted(1)])
    store = LmdbHistoryStore(tmp_path / "view", Base())
    store.follow(log, KEYS)
    assert lagging.end < store.position
    assert store.follow(lagging, KEYS) == 0
    assert rows(store.read("u")) == [(1, 1, 1)]


def test_after_another_boot_the_view_is_rebuilt(tmp_path):
    """It is not synced, so what a power cut left of it is not to be trusted."""
    log = SegmentLog(tmp_path / "log", "os")
    log.append([posted(1)])
    store = LmdbHistoryStore(tmp_path / "view", Base())
    store.follow(log, KEYS)
    store.append("u", events([99]))  # stands for what a half-written view might hold
    store.close()
    (tmp_path / "view" / "boot_id").write_text("another boot")
    store = LmdbHistoryStore(tmp_path / "view", Base())
    assert store.read("u") is None
    assert store.follow(log, KEYS) == 1
    assert rows(store.read("u")) == [(1, 1, 1)]


def test_a_user_id_that_does_not_fit_is_refused_and_unknown(tmp_path):
    store = LmdbHistoryStore(tmp_path / "view", Base())
    too_long = "ä" * MAX_USER_BYTES
    with pytest.raises(DataError, match=f"user id of {2 * MAX_USER_BYTES} bytes"):
        store.append(too_long, events([1]))
    assert store.read(too_long) is None


def _post(directory: str, pipe) -> None:
    log = SegmentLog(Path(directory) / "log", "os")
    store = LmdbHistoryStore(Path(directory) / "view", Base())
    for number in iter(pipe.recv, None):
        log.append([posted(number)])
        store.follow(log, KEYS)
        pipe.send("done")


def test_another_process_sees_an_event_at_its_next_read(tmp_path):
    store = LmdbHistoryStore(tmp_path / "view", Base())
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_post, args=(str(tmp_path), there))
    process.start()
    for number in range(1, 200):
        here.send(number)
        assert here.poll(60)
        assert here.recv() == "done"
        assert len(store.read("u")) == number
    here.send(None)
    process.join(60)
    assert process.exitcode == 0
