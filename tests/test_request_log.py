"""The writer of the request log: what happens around its files never ends it."""

from pathlib import Path

import pytest

from recsys.request_log import LoggedRequest, encode, files, read_file
from serving.request_log import RequestLog, RequestLogConfig


def answer(number: int, **asked) -> LoggedRequest:
    return LoggedRequest(str(number), "u", number, "log", 0, "s", "h", "c", "m", asked, ())


def logged(directory: Path) -> list[str]:
    return [request.request_id for path in files(directory) for request, _ in read_file(path)]


def test_a_process_whose_file_another_removed_goes_on_in_a_new_one(tmp_path):
    quiet = RequestLog(tmp_path, RequestLogConfig(1.0))
    quiet._write(b"")
    [path] = files(tmp_path)
    path.unlink()  # as another process does that makes room
    quiet.offer(answer(1))
    quiet.offer(answer(2))
    quiet.close()
    assert (logged(tmp_path), quiet.dropped) == (["1", "2"], 0)


@pytest.mark.timeout(60)
def test_an_answer_that_cannot_be_written_is_dropped_alone(tmp_path):
    log = RequestLog(tmp_path, RequestLogConfig(1.0))
    log.offer(answer(1, filters=["\ud800"]))
    log.offer(answer(2))
    log.close()
    assert (logged(tmp_path), log.dropped) == (["2"], 1)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    log = RequestLog(tmp_path, RequestLogConfig(1.0))
    log._write(encode(answer(1)))
    [path] = files(tmp_path)
    real = Path.open

    class Full:
        """A file on a disk with room for ten more bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, line):
            return self.file.write(line[:10])

    monkeypatch.setattr(Path, "open", lambda path, *how, **more: Full(real(path, *how, **more)))
    log.offer(answer(2))
    log.close()
    monkeypatch.undo()
    assert log.dropped == 1
    log = RequestLog(tmp_path, RequestLogConfig(1.0))
    log._path = path
    log._write(encode(answer(3)))
    log.close()
    assert logged(tmp_path) == ["1", "3"]
