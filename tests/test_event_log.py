"""The event log: nothing acknowledged is lost, nothing is written twice, and damage is never passed over."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.stores import Event
from serving.event_log import SegmentLog

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
EVENTS = st.builds(
    Event,
    event_id=st.integers(0, 30).map(str),
    user_id=TEXT,
    item_id=TEXT,
    time=st.integers(-(2**63), 2**63 - 1),
    action=TEXT,
    value=st.floats(allow_nan=False, allow_infinity=False),
)


def event(number: int, event_id: str | None = None) -> Event:
    return Event(str(number) if event_id is None else event_id, f"user {number % 3}", f"item {number}", number)


def replayed(log: SegmentLog, start: int = 0) -> list[Event]:
    return [record.event for record in log.replay(start)]


STEPS = st.lists(st.tuples(st.sampled_from(["first", "second", "reopen"]), st.lists(EVENTS, max_size=6)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, window=st.integers(1, 12), segment_bytes=st.sampled_from([1, 300, 2**20]))
def test_two_writers_that_close_and_open_at_will_are_one_log(steps, window, segment_bytes):
    """The same verdicts and events, from every position on, as of a list and the newest ids with their events."""
    expected: list[Event] = []
    ids: dict[str, Event] = {}  # the newest `window`, oldest first
    with tempfile.TemporaryDirectory() as directory:

        def opened() -> SegmentLog:
            return SegmentLog(Path(directory), "os", window, segment_bytes)

        writers = {"first": opened(), "second": opened()}
        for writer, events in steps:
            if writer == "reopen":
                writers["first"].close()
                writers["first"] = opened()
            verdicts = writers["first" if writer == "reopen" else writer].append(events)
            new: list[Event] = []
            for posted, verdict in zip(events, verdicts, strict=True):
                known = next((e for e in new if e.event_id == posted.event_id), ids.get(posted.event_id))
                assert verdict == ("accepted" if known is None else "duplicate" if known == posted else "conflict")
                new += [posted] * (known is None)
            expected += new
            for posted in new:
                ids[posted.event_id] = posted
            for event_id in list(ids)[: max(len(ids) - window, 0)]:
                del ids[event_id]
        for log in writers.values():
            log.refresh()
            records = list(log.replay())
            assert [record.event for record in records] == expected
            for number, record in enumerate(records):
                assert replayed(log, record.end) == expected[number + 1 :]
            log.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_torn_tail_is_cut_off_and_told(data, sizes):
    """Cut anywhere in the file, with rubbish after the cut or not: whole records stay, the rest goes."""
    with tempfile.TemporaryDirectory() as directory:
        log = SegmentLog(Path(directory), "os")
        ends = [0]
        for size in sizes:
            log.append([event(len(ends) + number) for number in range(size)])
            ends = [0, *(record.end for record in log.replay())]
        log.close()
        (path,) = Path(directory).glob("*.jsonl")
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        torn = whole[:cut] + data.draw(st.binary(max_size=20).filter(lambda rubbish: b"\n" not in rubbish))
        path.write_bytes(torn)
        kept = max(end for end in ends if end <= cut)
        log = SegmentLog(Path(directory), "os")
        assert log.end == kept
        assert log.recovered_bytes == len(torn) - kept
        assert path.read_bytes() == whole[:kept]
        log.append([event(99)])
        assert replayed(log) == [event(number + 1) for number in range(ends.index(kept))] + [event(99)]
        log.close()


def test_a_writer_cuts_off_the_torn_tail_of_another_that_died(tmp_path):
    log = SegmentLog(tmp_path, "os")
    log.append([event(1)])
    with (tmp_path / f"{0:020d}.jsonl").open("ab") as file:
        file.write(b'0000abcd {"id":"half a rec')
    log.append([event(2)])
    assert log.recovered_bytes == 26
    assert replayed(log) == [event(1), event(2)]


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_damage_before_sound_records_is_refused_and_left_alone(place, bit):
    with tempfile.TemporaryDirectory() as directory:
        log = SegmentLog(Path(directory), "os")
        log.append([event(1), event(2)])
        damaged_bytes = log.end
        log.append([event(3)])
        log.close()
        (path,) = Path(directory).glob("*.jsonl")
        damaged = bytearray(path.read_bytes())
        damaged[int(place * damaged_bytes)] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged record at byte \d+"):
            SegmentLog(Path(directory), "os")
        assert path.read_bytes() == damaged


def test_the_position_of_a_refused_event_is_not_the_newest(tmp_path):
    log = SegmentLog(tmp_path, "os")
    one = replace(event(1), time=5)
    assert log.append([one, replace(one, time=500)]) == ["accepted", "conflict"]
    assert log.newest_position == 5


def test_a_segment_that_cannot_be_begun_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    log = SegmentLog(tmp_path, "os", segment_bytes=1)
    log.append([event(1)])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("serving.event_log.os.open", full)
        with pytest.raises(OSError, match="No space"):
            log.append([event(2)])
    assert log.append([event(2)]) == ["accepted"]
    assert replayed(log) == [event(1), event(2)]


def test_a_missing_segment_is_named(tmp_path):
    log = SegmentLog(tmp_path, "os", segment_bytes=1)
    for number in range(4):
        log.append([event(number)])
    sorted(tmp_path.glob("*.jsonl"))[1].unlink()
    with pytest.raises(DataError, match="missing segment"):
        replayed(log)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (replace(event(2), value=float("nan")), "finite"),
        (replace(event(2), value=float("inf")), "finite"),
        (replace(event(2), time=2**63), "64-bit"),
        (replace(event(2), user_id="\ud800"), "Unicode"),
    ],
)
def test_an_event_that_cannot_be_written_refuses_its_whole_batch(tmp_path, wrong, told):
    log = SegmentLog(tmp_path, "os")
    with pytest.raises(DataError, match=told):
        log.append([event(1), wrong])
    assert log.append([event(1)]) == ["accepted"]
    assert replayed(log) == [event(1)]


def test_an_event_without_an_id_gets_one_of_its_own(tmp_path):
    log = SegmentLog(tmp_path, "os")
    assert log.append([event(1, ""), event(1, "")]) == ["accepted", "accepted"]
    first, second = (found.event_id for found in replayed(log))
    assert len({first, second, ""}) == 3


def test_a_full_disk_leaves_nothing_of_the_batch(tmp_path, monkeypatch):
    log = SegmentLog(tmp_path, "os")
    log.append([event(1)])
    write = os.write

    def short_of_space(file: int, data: bytes) -> int:
        if len(data) < 60:
            raise OSError(28, "No space left on device")
        return write(file, data[: len(data) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", short_of_space)
        with pytest.raises(OSError, match="No space"):
            log.append([event(2), event(3)])
    assert log.append([event(2)]) == ["accepted"]
    assert replayed(log) == [event(1), event(2)]


def test_fsync_comes_before_the_answer_even_to_a_repeat_of_what_another_process_wrote(tmp_path, monkeypatch):
    """A repeat is told "duplicate", which promises as much as "accepted": its first copy must be on the disk."""
    synced: list[int] = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (synced.append(os.fstat(file).st_size), fdatasync(file)))
    careless, careful = SegmentLog(tmp_path, "os"), SegmentLog(tmp_path, "fsync")
    careless.append([event(1)])
    assert synced == []
    assert careful.append([event(1)]) == ["duplicate"]
    assert synced == [careful.end]
    careful.append([event(2)])
    assert synced[1:] == [careful.end]


def _append_shared(directory: str, numbers: list[int], accepted) -> None:
    log = SegmentLog(Path(directory), "os", segment_bytes=2_000)
    accepted.put(sum(log.append([event(number), event(number + 1)]).count("accepted") for number in numbers))


def test_processes_that_write_the_same_ids_at_once_write_each_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    accepted = context.Queue()
    numbers = list(range(200))
    orders = [numbers, numbers[::-1], numbers[100:] + numbers[:100]]
    processes = [context.Process(target=_append_shared, args=(str(tmp_path), order, accepted)) for order in orders]
    for process in processes:
        process.start()
    total = sum(accepted.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
    found = [record.event_id for record in replayed(SegmentLog(tmp_path, "os"))]
    assert sorted(found, key=int) == [str(number) for number in range(201)]
    assert total == 201


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from recsys.stores import Event
from serving.event_log import SegmentLog

log = SegmentLog(Path(sys.argv[1]), segment_bytes=5_000)
for number in range(10**6):
    log.append([Event(f"{number}", "user", "item" * 20, number)])
    print(number, flush=True)
"""


def test_everything_acknowledged_survives_a_kill(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [int(next(process.stdout)) for _ in range(300)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout if line.endswith("\n")]
    process.wait(120)
    found = [int(record.event_id) for record in replayed(SegmentLog(tmp_path))]
    assert found == list(range(len(found)))
    assert len(found) in (len(acknowledged), len(acknowledged) + 1)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "duplicate"),
        ({"value": -0.0}, "duplicate"),
        ({"value": 0.5}, "conflict"),
        ({"user_id": "a", "item_id": "bc"}, "conflict"),  # the same letters, parted elsewhere
        ({"item_id": "", "action": "c"}, "conflict"),
        ({"time": 6}, "conflict"),
        ({"time": 6, "stamped": True}, "duplicate"),  # the service gave the time: it tells nothing
    ],
)
def test_what_makes_a_repeat_the_same_event(tmp_path, changes, verdict):
    posted = Event("1", "ab", "c", 5)
    log = SegmentLog(tmp_path, "os")
    assert log.append([posted]) == ["accepted"]
    assert log.append([replace(posted, **changes)]) == [verdict]
    assert replayed(log) == [posted]
    log.close()


@pytest.mark.parametrize("hole", [8, 16, 300])
def test_zeros_before_sound_records_are_damage_and_zeros_at_the_end_a_torn_tail(tmp_path, hole):
    log = SegmentLog(tmp_path, "os")
    log.append([event(number) for number in range(50)])
    log.close()
    (path,) = tmp_path.glob("*.jsonl")
    whole = path.read_bytes()
    damaged = whole[:1000] + bytes(hole) + whole[1000 + hole :]
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged record at byte \d+"):
        SegmentLog(tmp_path, "os")
    assert path.read_bytes() == damaged
    path.write_bytes(whole + bytes(hole) + b"rest of a page\n")
    log = SegmentLog(tmp_path, "os")
    assert (len(replayed(log)), path.read_bytes()) == (50, whole)
