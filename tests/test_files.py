"""Files are whole or absent; histories keep the point-in-time rule."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import DataError
from recsys.files import read_json, whole_directory, whole_file, work_directory, write_json
from recsys.history import Events, Histories
from recsys.randomness import derive, generator


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text(f"half{1 / 0}")
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_directory_leaves_the_old_one_and_nothing_else(tmp_path: Path):
    path = tmp_path / "set"
    for content in ("one", "two"):
        with whole_directory(path) as temporary:
            (temporary / "file").write_text(content)
    with pytest.raises(ZeroDivisionError), whole_directory(path) as temporary:
        (temporary / "file").write_text(f"three{1 / 0}")
    assert (path / "file").read_text() == "two"
    assert [p.name for p in path.iterdir()] == ["file"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


WRITER = """
import sys
import os
import subprocess
import sys
from pathlib import Path

from recsys.files import whole_directory

with whole_directory(Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("h")
    print(temporary, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_a_live_one_has_stays(tmp_path: Path):
    path = tmp_path / "set"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    left, held = (Path(writer.stdout.readline().decode().strip()) for writer in writers)
    stranger = tmp_path / ".set.b.old.abcd1234"  # of a directory "set.b", which may be all there is of it
    stranger.mkdir()

    def write() -> None:
        with whole_directory(path) as temporary:
            (temporary / "whole").write_text("w")

    try:
        writers[0].kill()
        writers[0].wait()
        for directory in (left, held, stranger):
            os.utime(directory, (0, 0))
        write()
        assert left.exists()  # there was no `path` yet: what lies beside it might be all there is
        write()
        assert [left.exists(), (held / "half").exists(), stranger.exists()] == [False, True, True]
        assert (path / "whole").read_text() == "w"
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


@pytest.mark.parametrize("kind", ["whole_file", "work_directory"])
def test_files_and_work_of_killed_processes_go_with_the_next_one_and_those_in_use_stay(kind: str, tmp_path: Path):
    path = tmp_path / "set"
    code = WRITER.replace("whole_directory", kind).replace('(temporary / "half").write_text("h")', "pass")
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    left, held, young = (Path(writer.stdout.readline().decode().strip()) for writer in writers)
    other = tmp_path / left.name.replace(".set.", ".settings.")
    other.mkdir()
    try:
        for writer in (writers[0], writers[2]):
            writer.kill()
            writer.wait()
        for there in (left, held, other):
            os.utime(there, (0, 0))
        with {"whole_file": whole_file, "work_directory": work_directory}[kind](path) as temporary:
            assert temporary.exists()
            assert [one.exists() for one in (left, held, young, other)] == [False, True, True, True]
        assert not temporary.exists()
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_json_errors_name_file_and_place(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1,\n "b": }')
    with pytest.raises(DataError, match=r"x\.json: not valid JSON.*line 2"):
        read_json(path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))


events = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 3), st.integers(-5, 5)), max_size=30)


def _events(rows) -> Events:
    rows = sorted(rows, key=lambda row: row[2])
    item, action, time = zip(*rows, strict=True) if rows else ((), (), ())
    return Events(np.array(item, np.uint32), np.array(action, np.uint8), np.array(time, np.int64))


@given(events, st.integers(-6, 6))
def test_before_is_strict_and_loses_nothing_earlier(rows, at):
    history = _events(rows)
    kept = history.before(at)
    assert (kept.time < at).all()
    assert len(kept) == sum(row[2] < at for row in rows)


@given(events, events)
def test_concatenate_orders_by_time_and_keeps_earlier_parts_first(a, b):
    first, second = _events(a), _events(b)
    both = Events.concatenate(first, second)
    rows = [
        (time, part, item)
        for part, run in enumerate((first, second))
        for item, time in zip(run.item, run.time, strict=True)
    ]
    expected = sorted(rows, key=lambda row: row[:2])
    assert both.time.tolist() == [row[0] for row in expected]
    assert both.item.tolist() == [row[2] for row in expected]


def test_histories_survive_the_disk_and_damage_is_told(tmp_path: Path):
    histories = Histories(_events([(1, 0, 1), (2, 1, 2), (3, 0, 3)]), np.array([0, 2, 2, 3]))
    histories.save(tmp_path)
    loaded = Histories.load(tmp_path)
    assert len(loaded) == 3
    assert [loaded.of(u).item.tolist() for u in range(3)] == [[1, 2], [], [3]]
    np.save(tmp_path / "time.npy", np.arange(5))
    with pytest.raises(DataError, match="5 times"):
        Histories.load(tmp_path)
    (tmp_path / "item.npy").unlink()
    with pytest.raises(DataError, match="not a packed history"):
        Histories.load(tmp_path)


def test_no_pickle_is_loaded_as_a_history(tmp_path: Path):
    Histories(Events.empty(), np.array([0])).save(tmp_path)
    np.save(tmp_path / "item.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError):
        Histories.load(tmp_path)


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.text(max_size=10))
def test_draws_depend_on_seed_step_and_purpose_alone(seed, step, purpose):
    same = generator(seed, step, purpose).random(4)
    np.testing.assert_array_equal(same, generator(seed, step, purpose).random(4))
    others = {derive(seed + 1, step, purpose), derive(seed, step + 1, purpose), derive(seed, step, purpose + "x")}
    assert derive(seed, step, purpose) not in others
    assert 0 <= derive(seed, step, purpose) < 2**63
