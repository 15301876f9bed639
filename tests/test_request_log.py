"""The writer of the request log: what happens around its files never ends it."""

from pathlib import Path

import pytest

from recsys.request_log import LoggedRequest, files, read_file
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
